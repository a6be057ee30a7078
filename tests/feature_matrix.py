"""Which feature of PyTorch works with which library's models on which backend: the README's table.

    python tests/feature_matrix.py     # prints the table

A cell is a test: of tests/test_feature_matrix.py, or of the file that the feature names.
"""

from __future__ import annotations

from dataclasses import dataclass

CPU, GPU = ("cpu", "torch"), ("cuda", "triton")
SOURCES = {
    "transformers": "hugging_face",
    "timm": "timm",
    "timm, V2": "timm_v2",
    "original": "original_poolformer",
    "our own": "own",
}


@dataclass(frozen=True)
class Feature:
    """A row. check: its function in test_feature_matrix.py, or file::test.

    gpu: on GPU backends too; kernels: the "torch" backend is left out, where tracing finds stock
    operators alone, and processes take long to start.
    """

    name: str
    check: str
    sources: tuple[str, ...] = tuple(SOURCES)
    gpu: bool = False
    kernels: bool = False

    def backends(self, source: str) -> tuple[str, ...]:
        """Those that a test runs; PoolFormerV2's activation has no kernel on GPUs."""
        if source not in self.sources:
            return ()
        if self.kernels:
            return ("cpu",)
        return (*CPU, *GPU) if self.gpu and source != "timm, V2" else CPU


FEATURES = (
    Feature("inference, float32 and bfloat16, channels_last", "inference", gpu=True),
    Feature("training: every gradient, drop path", "training", gpu=True),
    Feature("autocast, bfloat16", "autocast"),
    Feature("deepcopy, pickle, torch.save", "copies"),
    Feature("torch.utils.checkpoint", "checkpointing"),
    Feature(
        "torch.compile, any batch, any size of 64² or more, one graph", "compiled", kernels=True
    ),
    Feature("torch.compile, training", "compiled_training", kernels=True),
    Feature("torch.export, saved and loaded, any batch", "exported", kernels=True),
    Feature("torch.onnx.export (a stock graph)", "onnx"),
    *(
        Feature(
            f"{way}, two processes, gloo: every gradient",
            "test_distributed.py::test_losses_and_gradients_are_those_of_one_process",
            kernels=True,
        )
        for way in ("DDP", "FSDP2")
    ),
    Feature(
        "Auto classes, pipeline",
        "test_transformers.py::test_a_pipeline_of_an_auto_model",
        ("transformers",),
    ),
    Feature(
        "Trainer, bf16, resume",
        "test_transformers.py::test_trainer_has_the_losses_of_eager",
        ("transformers",),
    ),
    Feature(
        "train and validate loops, mixup, EMA",
        "test_timm.py::test_training_has_the_losses_of_eager",
        ("timm", "timm, V2"),
    ),
    Feature("features_only", "test_timm.py::test_features_only", ("timm", "timm, V2")),
)


def table() -> str:
    """In Markdown: a row a feature, a column a library."""
    rows = [["", *SOURCES], ["---"] * (len(SOURCES) + 1)]
    for feature in FEATURES:
        cells = [", ".join(feature.backends(source)) or "–" for source in SOURCES]
        rows.append([feature.name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
