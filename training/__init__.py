"""The engine: what each stage computes, in plain PyTorch.

Start with `stages.py` (the table of stages) and the module of a stage's name. `settings.py` holds
every setting, `presets.py` the named runs, `store.py` what is kept where and how it is recognised
(`stage_files.py` its files, `attempts.py` what a new attempt keeps), `runner.py` how a stage is
computed or found again, `loop.py` the one training loop.
"""
