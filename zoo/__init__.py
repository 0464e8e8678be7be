"""The models that the suite compares, behind timm's interface. Importing this package registers them with timm."""

from zoo import hiri_extended, hiri_vit, hivit, hivit_mae, hrformer, hrvit
from zoo.backbone import Backbone
from zoo.baselines import cswin, hrnet, mit, swin
from zoo.errors import ZooError
from zoo.published import LoadReport, load_published, published_keys
from zoo.registry import create_model, family, list_models

__all__ = [
    "Backbone",
    "LoadReport",
    "ZooError",
    "create_model",
    "cswin",
    "family",
    "hiri_extended",
    "hiri_vit",
    "hivit",
    "hivit_mae",
    "hrformer",
    "hrnet",
    "hrvit",
    "list_models",
    "load_published",
    "mit",
    "published_keys",
    "swin",
]
