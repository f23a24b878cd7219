"""cifar10: 50,000 unconditional 32-pixel images against the whole training set, as consistency and score distillation report it."""

from .measures import Distance
from .published import Definition

DEFINITION = Definition(
    n=50_000,
    side=32,
    pipelines=("DDPMPipeline",),
    teacher="a local DDPMPipeline folder of CIFAR-10, as safetensors: "
    "hf download google/ddpm-cifar10-32 --revision REVISION --local-dir PATH (a pickle is refused; docs/tracks.md converts it)",
    data="reference/ (the 50,000 training images of CIFAR-10 as PNG, which are trained on too); docs/tracks.md writes them",
    prompts="",
    guidance=1.0,
    measures=(Distance("fid", "legacy_tensorflow"), Distance("fd", "embedded")),
    parameters=35.7e6,
    chunk=250,
    batch_size=128,
    sources=(
        "50,000 images against the training set; the network's own bilinear resize, as EDM's evaluation has it",
        "fd on the embedded features is no paper's: it is what can be had without published weights",
    ),
)
