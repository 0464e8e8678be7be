"""Every row of the four families' ablations that can be trained, trained: narrow networks on the demo's data."""

from __future__ import annotations

import pytest
from tests_support import configuration

from results.ledger import Ledger

HEAD = {"head_widths": [4, 4, 8, 8], "head_features": 64}
HRVIT = {"channels": [16, 16, 32, 32], "head_dim": 8, **HEAD}
HRFORMER = {"channels": [8, 16, 16, 32], "num_modules": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], **HEAD}
HRNET = {"channels": [8, 16, 16, 32], "num_modules": [1, 1, 1, 1], "num_blocks": [1, 1, 1, 1], **HEAD}
SWIN = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
# The same kinds of stages, blocks, windows and stems as in the suite: only widths and depths are others.
NARROW = {
    "hivit_base": {"embed_dim": 64},
    "m_vit": {"channels": [16, 32, 64, 64], "depths": [1, 1, 2, 1]},
    "hiri_vit_small": {"channels": [8, 16, 32, 64, 64], "depths": [1, 1, 1, 2, 1]},
    "hrvit_b1": {**HRVIT, "num_blocks": [1, 1, 2, 2], "last_blocks": [1, 1, 2, 2]},
    "hrvit_b2": {**HRVIT, "num_blocks": [1, 1, 2, 2], "last_blocks": [1, 1, 2, 2]},
    "hrvit_b3": {**HRVIT, "num_blocks": [1, 1, 2, 3], "last_blocks": [1, 1, 2, 3]},
    "hrformer_tiny": HRFORMER,
    "hrformer_small": HRFORMER | {"channels": [8, 16, 32, 32]},
    "hrformer_base": HRFORMER | {"channels": [16, 16, 32, 32]},
    "hrnet_tiny": HRNET,
    "hrnet_small": HRNET | {"channels": [16, 16, 32, 32]},
    "hrnet_base": HRNET | {"channels": [16, 32, 32, 64]},
    **{
        f"hrnet_{kind}_w{width}": HRNET | {"channels": [width // 4 * 2, 16, 32, width // 8 * 16]}
        for kind in ("mit", "cswin")
        for width in (18, 32, 40)
    },
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "swin_tiny_dw", "intrawin_tiny", "intrawin_tiny_dw"), SWIN),
}


def narrowed(model: str, config: dict) -> dict:
    fields = dict(NARROW.get(model, {}))
    if model == "hivit_base":
        fields["num_heads"] = 8 if config.get("mid_attention") else 4
        fields["depths"] = [min(depth, 3) for depth in config.get("depths", [1, 1, 3])]
    elif model in ("m_vit", "hiri_vit_small"):
        fields["num_heads"] = [1, 2, 4, 4] if "reductions" in config else [4] * len(config.get("num_heads", [4, 4]))
    if "third_branch_blocks" in config:
        fields["third_branch_blocks"] = [min(blocks, 3) for blocks in config["third_branch_blocks"]]
        del fields["num_blocks"], fields["last_blocks"]  # of the third branch they would change nothing
    return fields


def overrides(suite: str) -> list[str]:
    settings = [f"suite={suite}", "stages=[cost,train,evaluate]", "suite.must_gain=-100"]
    for name, benchmark in configuration(f"suite={suite}").suite.benchmarks.items():
        at = f"suite.benchmarks.{name}"
        settings += [f"{at}.data=digit_scenes_{benchmark.task}", f"{at}.input_size=[64,64]"]
        settings += [f"+{at}.data_options={{train:16,validation:12}}"]
        for recipe in ("recipe", *(f"recipes.{other}" for other in benchmark.recipes)):
            brief = {"iterations": 2, "warmup_iterations": 1, "batch_size": 4, "workers": 0}
            settings += [f"{at}.{recipe}.{field}={value}" for field, value in brief.items()]
        if benchmark.task == "segmentation":
            recipe = benchmark.recipe  # its settings are those for crops of 640 pixels
            settings += [f"~{at}.recipe.augmentation.{key}" for key in recipe.augmentation]
            settings += [f"~{at}.recipe.evaluation.{key}" for key in recipe.evaluation]
        for label, entry in benchmark.models.items():
            fields = narrowed(entry.name or label, entry.config)
            settings += [f"++{at}.models.{label}.config.{k}={str(v).replace(' ', '')}" for k, v in fields.items()]
    return settings


@pytest.mark.long
@pytest.mark.parametrize(
    ("suite", "trainings"),
    [("ablation_hrvit", 44), ("ablation_hrformer", 27), ("ablation_hivit", 13), ("ablation_hiri_vit", 20)],
)
def test_every_row_trains(suite, trainings, command_line):
    command_line.run(*overrides(suite), "executor=inline", miniature=False, timeout=3600)
    records = list(Ledger(command_line.output / "ledger").records())
    assert {record.status for record in records} == {"done"}
    for stage in ("train", "evaluate"):
        assert sum(record.stage == stage for record in records) == trainings
