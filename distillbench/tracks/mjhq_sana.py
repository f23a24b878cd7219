"""mjhq-sana: SANA at 1024 pixels on the 30,000 prompts and images of MJHQ-30K, as SANA and SANA-Sprint report it, with HPSv2.1."""

from .measures import Agreement, Distance
from .published import Definition

DEFINITION = Definition(
    n=30_000,
    side=1024,
    pipelines=("SanaPipeline",),
    teacher="a local SanaPipeline folder of SANA at 1024 pixels, as safetensors: "
    "hf download Efficient-Large-Model/Sana_1600M_1024px_diffusers --revision REVISION --local-dir PATH",
    data="meta_data.json of MJHQ-30K and reference/ (its images, a folder a category): "
    "hf download playgroundai/MJHQ-30K --repo-type dataset --local-dir PATH, and unzip mjhq30k_imgs.zip in PATH/reference; docs/tracks.md",
    prompts="meta_data.json",
    guidance=4.5,
    measures=(
        Distance("fid", "legacy_pytorch", size=1024),
        Agreement("clip", "openclip-l14-openai"),
        Agreement("hps", "hps-v2.1"),
        Distance("fd", "embedded", size=1024),
    ),
    parameters=1.6e9,
    chunk=4,
    batch_size=4,
    sources=(
        "30,000 prompts, FID at 1024 pixels, resized to 299 by pytorch-fid: SANA's metrics toolkit; guidance 4.5: its scripts' default",
        "which CLIP SANA's numbers are on was not found out: ViT-L/14 of OpenAI is this track's choice, raw cosine, no prefix",
        "HPSv2.1 on the same images is this track's choice; fd on the embedded features is what can be had without published weights",
    ),
)
