"""The network (`vit`), which parts of it are trained (`freezing`), and its files (`export`).

Knows neither images nor training. Import from the modules: naming this package imports no torch.
"""
