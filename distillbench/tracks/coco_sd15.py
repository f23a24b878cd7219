"""coco-sd15: Stable Diffusion 1.5 on 30,000 captions of COCO-2014's validation set, as DMD, DMD2 and SiD-LSG report it."""

from .measures import Agreement, Distance
from .published import Definition

DEFINITION = Definition(
    n=30_000,
    side=512,
    pipelines=("StableDiffusionPipeline",),
    teacher="a local StableDiffusionPipeline folder of Stable Diffusion 1.5, as safetensors: "
    "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --revision REVISION --local-dir PATH",
    data="prompts.txt (30,000 captions of COCO-2014 val, one a line) and reference/ (the images of val2014: "
    "curl -LO http://images.cocodataset.org/zips/val2014.zip); docs/tracks.md",
    prompts="prompts.txt",
    guidance=3.0,
    measures=(
        Distance("fid", "clean", size=256),
        Agreement("clip", "openclip-g14-laion2b-s12b-b42k", size=256, prefix="A photo depicts "),
        Distance("fd", "embedded", size=256),
    ),
    parameters=860e6,
    chunk=16,
    sources=(
        "30,000 captions, one image each; centre crop, PIL Lanczos to 256, clean-fid; CLIP ViT-g/14 behind 'A photo depicts': DMD2's code",
        "guidance 3: DMD (arXiv 2311.18828), whose teacher row it is; the list of captions is the user's, its checksum is in the identity",
        "fd on the embedded features is no paper's: it is what can be had without published weights",
    ),
)
