# What every config adds to mmdet's default_runtime.
custom_imports = dict(imports=["vision_mamba.mm"])
custom_hooks = [dict(type="PicturesHook", images=8)]
