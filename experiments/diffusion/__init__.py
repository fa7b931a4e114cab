"""Diffusion models: which training images taught a DDPM to draw this one?"""
