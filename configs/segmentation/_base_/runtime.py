_base_ = "mmseg::_base_/default_runtime.py"
custom_imports = dict(imports=["vision_mamba.mm"])
custom_hooks = [dict(type="PicturesHook", images=8)]
visualizer = dict(alpha=0.5)
