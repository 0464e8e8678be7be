"""Baselines of the papers' tables that timm does not have."""
