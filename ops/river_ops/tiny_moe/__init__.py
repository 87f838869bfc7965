"""The tiny mixture-of-experts model that ships with River: its problems and its pre-training."""
