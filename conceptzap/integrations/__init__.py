"""Erasures in the programs that people draw with: ComfyUI, webui and Forge, and folders of diffusers."""
