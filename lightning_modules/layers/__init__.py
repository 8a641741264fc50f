"""Building blocks with parameters: one idea a file. Importing this package loads torch only.

Modules are put into a pretrained model in this order: load the base weights, insert the modules,
initialise last. Every module has `reset_parameters()`. A `PreTrainedModel` that builds some of
them in its own constructor calls it from `_init_weights`, for every module that holds parameters
itself (`Modulation`, `AdaRMSNorm`, `BranchGate`, `TTTLayer`, `LaCTLayer` and its parts,
`ChapterRouter`, `ProductKeyMemory`, banks, `ChunkConv`, `InPlaceTargets`):
`from_pretrained` passes over those that only have submodules, and leaves what a checkpoint lacks
uninitialised.
"""
