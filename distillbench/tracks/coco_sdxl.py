"""coco-sdxl: Stable Diffusion XL on 10,000 captions of COCO-2014's validation set, with FID of centre patches, as DMD2 reports it."""

from .measures import Agreement, Distance
from .published import Definition

DEFINITION = Definition(
    n=10_000,
    side=1024,
    pipelines=("StableDiffusionXLPipeline",),
    teacher="a local StableDiffusionXLPipeline folder of SDXL base 1.0, as safetensors: "
    "hf download stabilityai/stable-diffusion-xl-base-1.0 --revision REVISION --local-dir PATH",
    data="prompts.txt (10,000 captions of COCO-2014 val, one a line) and reference/ (the images of those captions); docs/tracks.md",
    prompts="prompts.txt",
    guidance=6.0,
    measures=(
        Distance("fid", "clean", size=512),
        Distance("patch-fid", "clean", crop=299),
        Agreement("clip", "openclip-g14-laion2b-s12b-b42k", size=256, prefix="A photo depicts "),
        Distance("fd", "embedded", size=256),
    ),
    parameters=2.57e9,
    chunk=4,
    batch_size=4,
    sources=(
        "10,000 captions; centre crop, PIL Lanczos to 512, clean-fid; patches of 299 from the middle, not resized; guidance 6: DMD2's code",
        "CLIP ViT-g/14 on images at 256 behind 'A photo depicts': DMD2's code",
        "images with a side below 299 are squeezed whole to a patch by PIL; there the network's own resizer does it",
        "fd on the embedded features is no paper's: it is what can be had without published weights",
    ),
)
