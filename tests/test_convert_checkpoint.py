"""tools/convert_checkpoint.py, and pretrained=True, on files in the authors' layouts."""

import argparse
import json
import stat

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors import safe_open

import vision_mamba
from tests.golden import recipe
from tests.models.golden import load_case
from tests.test_evaluate_predict import run
from vision_mamba.engine import convert


def official(case):
    return {name: torch.from_numpy(v) for name, v in recipe.make_state(load_case(case)["state_dict"]).items()}


def rsmamba():
    """Official tensors of test_rsmamba: the golden case has one layer less and a finer grid."""
    entries = dict(load_case("rsmamba_tinycfg_forward_reverse_shuffle_gate")["state_dict"])
    entries.update({k.replace("layers.2.", "layers.3."): shape for k, shape in entries.items() if "layers.2." in k})
    entries["backbone.pos_embed"] = [1, 16, 32]
    return {name: torch.from_numpy(v) for name, v in recipe.make_state(entries.items()).items()}


# What the authors' files hold beside the weights, and under which key these are.
LAYOUTS = {
    "test_vim": lambda: {"model": official("vim_tinycfg_v2_midcls"), "epoch": 299, "args": argparse.Namespace(lr=1.0)},
    "test_videomamba": lambda: {"model": official("videomamba_image_tinycfg")},
    "test_vmamba": lambda: {"model": official("vmamba_tinycfg_v05_noz"), "max_accuracy": 82.6},
    "test_mambavision": lambda: {"state_dict": official("mambavision_tinycfg_64"), "arch": "mamba_vision_T"},
    "test_rsmamba": lambda: {"meta": {"epoch": 500}, "state_dict": rsmamba()},
    "test_samba": lambda: {"state_dict": {f"backbone.{k}": v for k, v in official("samba_tinycfg_64").items()}},
}


@pytest.fixture
def file(tmp_path):
    """Makes a file with an official layout."""

    def make(contents, name="official.pth"):
        torch.save(contents, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def some_models(monkeypatch):
    """Fewer models to look among: building them all takes longer than these tests."""
    names = [
        "vim_small_patch16_224",
        "vim_tiny_patch16_224",
        "vim_tiny_patch16_stride8_224",
        "videomamba_tiny",
        "vim_nano",
    ]
    names += [
        "videomamba_tiny_f8",
        "vmamba_tiny_s1l8",
        "vmamba_nano",
        "xt_vmamba_tiny_512_256",
        "samba",
        "mambavision_nano",
    ]
    assert set(names) <= set(convert.zoo_models())
    monkeypatch.setattr(convert, "zoo_models", lambda: names)


def same_weights(model, other):
    other = other.state_dict()
    return all(torch.equal(tensor, other.pop(name)) for name, tensor in model.state_dict().items()) and not other


@pytest.mark.parametrize("name", LAYOUTS)
def test_converted_file_is_the_official_model(name, file, tmp_path, capsys):
    contents, out = LAYOUTS[name](), tmp_path / "ours.safetensors"
    code, said, err = run("convert_checkpoint", file(contents), out, "--model", name, capsys=capsys)
    assert code == 0, err
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    num_classes = 0 if name == "test_samba" else 10
    assert metadata["model"] == name and int(metadata["num_classes"]) == num_classes
    assert json.loads(metadata["input_size"]) == [3, 64, 64] and metadata["source"] == "official.pth"
    assert f"{name}, {num_classes} classes" in said

    straight = timm.create_model(name, num_classes=num_classes)
    vision_mamba.load_checkpoint(straight, contents)
    for ours in (
        timm.create_model(name, num_classes=num_classes, checkpoint_path=str(out)),
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(out), num_classes=num_classes)),
    ):
        assert same_weights(ours, straight)
    assert not same_weights(timm.create_model(name, num_classes=num_classes), straight)
    assert list(tmp_path.glob(".*")) == []


def test_model_is_found_by_names_and_shapes(some_models, file, tmp_path, capsys):
    case = official("vim_tiny_224")
    path, out = file({"model": case}, "vim_t_midclstok_76p1acc.pth"), tmp_path / "ours.safetensors"
    code, said, _ = run("convert_checkpoint", path, out, capsys=capsys)
    assert code == 0 and f"{path} has the tensors of vim_tiny_patch16_224 and is taken for it" in said
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(path.stat().st_mode)
    # VideoMamba's image models have the same tensors: the released files' names tell them apart.
    assert convert.guess_model(case, "videomamba_t16_in1k_res224.pth") == "videomamba_tiny"
    # A filled-in context encoder or time axis is not in the file.
    assert convert.guess_model(official("vmambav2v_tiny_224"), "anything.pth") == "vmamba_tiny_s1l8"
    code, _, err = run("convert_checkpoint", file({"model": case}, "mine.pth"), out, "--overwrite", capsys=capsys)
    assert code == 2 and "has the tensors of vim_tiny_patch16_224, videomamba_tiny; say which it is" in err


def test_classes_and_bands_follow_the_file():
    state = official("vim_tinycfg_v2_midcls")
    state["head.weight"], state["head.bias"] = torch.zeros(30, 32), torch.zeros(30)
    state["patch_embed.proj.weight"] = torch.randn(32, 13, 16, 16)
    tensors, metadata = convert.convert(state, "test_vim", "x.pth")
    assert metadata["num_classes"] == "30" and tensors["head.weight"].shape == (30, 32)
    assert json.loads(metadata["input_size"]) == [13, 64, 64]
    assert torch.equal(tensors["patch_embed.proj.weight"], state["patch_embed.proj.weight"])


def test_files_of_no_model(some_models, file, tmp_path, capsys):
    state = official("vim_tiny_224")
    del state["layers.7.mixer.D_b"]
    code, _, err = run("convert_checkpoint", file(state), tmp_path / "x.safetensors", capsys=capsys)
    assert code == 2 and "nearest is vim_tiny_patch16_224" in err and "blocks.7.mixer.D" in err and "--model" in err
    code, _, err = run(
        "convert_checkpoint", file({"fc.weight": torch.zeros(3)}), tmp_path / "x.safetensors", capsys=capsys
    )
    assert code == 2 and "not of a model of the zoo: fc.weight" in err
    assert not (tmp_path / "x.safetensors").exists()


def test_what_does_not_fit_the_named_model(file, tmp_path, capsys):
    def fails(contents, *arguments):
        code, _, err = run("convert_checkpoint", file(contents), tmp_path / "x.safetensors", *arguments, capsys=capsys)
        assert code == 2 and not (tmp_path / "x.safetensors").exists()
        return err

    state = official("vim_tinycfg_v2_midcls")
    extra = {**state, "layers.9.mixer.D": torch.zeros(64)}
    assert "1 unexpected: blocks.9.mixer.D." in fails(extra, "--model", "test_vim")
    assert "is not of test_vmamba" in fails(state, "--model", "test_vmamba")
    assert "patch_embed.proj.weight (32, 3, 16, 16) for (96, 3, 8, 8)" in fails(state, "--model", "vim_nano")
    assert "did you mean 'vim_nano'" in fails(state, "--model", "vim_nan")
    assert "unknown model 'resnet18'" in fails(state, "--model", "resnet18")
    larger = {**state, "pos_embed": torch.zeros(1, 37, 32)}
    err = fails(larger, "--model", "test_vim")
    assert "pos_embed (1, 37, 32)" in err and "(1, 17, 32)" in err and "--img-size" in err
    assert "leave --img-size out" in fails(
        official("vmamba_tinycfg_v05_noz"), "--model", "test_vmamba", "--img-size", 96
    )
    image = official("videomamba_image_tinycfg")  # the positions in time would be made up
    assert "lacks 128 of test_videomamba_f4's" in fails(image, "--model", "test_videomamba_f4")
    assert "holds no weights" in fails({"epoch": 3})
    out = tmp_path / "large.safetensors"
    arguments = (file(larger), out, "--model", "test_vim", "--img-size", 96)
    assert run("convert_checkpoint", *arguments, capsys=capsys)[0] == 0
    with safe_open(out, "pt") as opened:
        assert json.loads(opened.metadata()["input_size"]) == [3, 96, 96]
        assert torch.equal(opened.get_tensor("pos_embed"), larger["pos_embed"])


def test_files_on_disk(file, tmp_path, capsys):
    path, out = file(LAYOUTS["test_vim"]()), tmp_path / "x.safetensors"

    def fails(*arguments):
        code, _, err = run("convert_checkpoint", *arguments, "--model", "test_vim", capsys=capsys)
        assert code == 2
        return err

    assert "no checkpoint file" in fails(tmp_path / "none.pth", out)
    assert "must end in .safetensors" in fails(path, tmp_path / "x.pth")
    (tmp_path / "damaged.pth").write_bytes(path.read_bytes()[:999])
    assert "not a readable checkpoint" in fails(tmp_path / "damaged.pth", out)
    out.write_text("mine")
    assert "--overwrite" in fails(path, out) and out.read_text() == "mine"
    assert run("convert_checkpoint", path, out, "--model", "test_vim", "--overwrite", capsys=capsys)[0] == 0
    assert out.stat().st_size > 10_000


def test_averaged_weights_on_request(file, tmp_path, capsys):
    state = official("vmamba_tinycfg_v05_noz")
    path = file({"model": state, "model_ema": {k: v + 1 for k, v in state.items()}})
    for flags, offset in (((), 0), (("--ema",), 1)):
        out = tmp_path / f"{offset}.safetensors"
        assert run("convert_checkpoint", path, out, "--model", "test_vmamba", *flags, capsys=capsys)[0] == 0
        with safe_open(out, "pt") as opened:
            assert torch.equal(opened.get_tensor("head.fc.bias"), state["classifier.head.bias"] + offset)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache folder of the Hugging Face hub that one file was downloaded to, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(contents, repo, file):
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        path = folder / "snapshots" / "0123abc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(contents, path)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("0123abc")
        return tmp_path

    return put


# The hub's repositories and files, as timm asks for them.
RELEASED = {
    "vim_tiny_patch16_224": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
    "videomamba_tiny": ("OpenGVLab/VideoMamba", "videomamba_t16_in1k_res224.pth"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_pretrained_from_the_hub(name, hub):
    state = official("vim_tiny_224")  # VideoMamba's tensors have the same names and shapes
    cache = hub({"model": state, "args": argparse.Namespace(lr=1.0)}, *RELEASED[name])
    model = timm.create_model(name, pretrained=True, cache_dir=cache)
    assert torch.equal(model.head.weight, state["head.weight"])
    assert torch.equal(model.blocks[23].mixer.A_log[1], state["layers.23.mixer.A_b_log"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_pretrained_from_the_hub_in_every_layout(name, hub):
    contents = LAYOUTS[name]()
    cache = hub(contents, "somebody/model", "weights.pth.tar")
    overlay = dict(hf_hub_id="somebody/model", hf_hub_filename="weights.pth.tar", num_classes=10, url="")
    if name == "test_samba":  # a segmentor's backbone has no head
        overlay["num_classes"] = 0
    ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache)
    straight = timm.create_model(name, num_classes=overlay["num_classes"])
    vision_mamba.load_checkpoint(straight, contents)
    assert same_weights(ours, straight)


def test_pretrained_from_a_release_page(tmp_path):
    state = official("vmambav2v_tiny_224")
    torch.save({"model": state}, tmp_path / "vssm1_tiny_0230s_ckpt_epoch_264.pth")
    model = timm.create_model("vmamba_tiny_s1l8", pretrained=True, cache_dir=tmp_path)
    assert torch.equal(model.head.fc.weight, state["classifier.head.weight"])


def test_without_a_network_the_file_is_named(hub, tmp_path):
    hub({}, "hustvl/Vim-tiny-midclstok", "README.md")
    with pytest.raises(RuntimeError, match="vim_t_midclstok_76p1acc.pth of hustvl/Vim-tiny-midclstok.*load_checkpoint"):
        timm.create_model("vim_tiny_patch16_224", pretrained=True, cache_dir=tmp_path)
