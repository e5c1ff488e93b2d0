"""Models that other libraries build, as they are: small ones, with random weights (the extra `zoo`).

What is told apart: weights shared or used by another module, tables handed out by a method, windows as rows,
queries per sample beside them, relative positions, gates, class tokens, learned queries, decoders, state
spaces; networks for images that give images: for segmentation, and for diffusion.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torchvision.models import segmentation, video

from psgrad import PerSampleGrads
from psgrad.dp import PrivacyEngine
from psgrad.tensors_in import tensors_in
from tests.model_oracle import grads_one_by_one

SAMPLES = 3
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def words(length=7):
    return {"input_ids": torch.randint(5, 60, (SAMPLES, length))}


def pictures(size):
    return {"pixel_values": torch.randn(SAMPLES, 3, size, size, dtype=torch.double)}


# model class, configuration class, its arguments, a batch
TRANSFORMERS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", SIZES, words),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", SIZES, words),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", SIZES | {"embedding_size": 16}, words),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", SIZES | {"embedding_size": 16}, words),
    "DeBERTa": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        words,
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
        words,
    ),
    "GPT-2, padded": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
        | {"pad_token_id": 0},
        lambda: words() | {"attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])},
    ),
    "GPT": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4}, words),
    "LLaMA": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"num_key_value_heads": 2}, words),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
        words,
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
        lambda: words() | {"decoder_input_ids": torch.randint(5, 60, (SAMPLES, 5))},
    ),
    "BART": ("BartModel", "BartConfig", ENCODER_DECODER | {"max_position_embeddings": 32}, words),
    "Whisper": (
        "WhisperForAudioClassification",
        "WhisperConfig",
        ENCODER_DECODER | {"num_mel_bins": 8, "max_source_positions": 20, "classifier_proj_size": 16},
        lambda: {"input_features": torch.randn(SAMPLES, 8, 40, dtype=torch.double)},
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {key: SIZES[key] for key in list(SIZES)[:4]} | {"image_size": 32, "patch_size": 8},
        functools.partial(pictures, 32),
    ),
    "SigLIP": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {key: SIZES[key] for key in list(SIZES)[:4]} | {"image_size": 16, "patch_size": 8},
        functools.partial(pictures, 16),
    ),
    "Perceiver": (
        "PerceiverForSequenceClassification",
        "PerceiverConfig",
        {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2}
        | {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 64},
        lambda: {"inputs": words()["input_ids"]},
    ),
    "DETR": (
        "DetrModel",
        "DetrConfig",
        {key: value for key, value in ENCODER_DECODER.items() if "_id" not in key and key != "vocab_size"}
        | {"num_queries": 4, "use_timm_backbone": False, "use_pretrained_backbone": False}
        | {
            "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4}
            | {"depths": [1] * 4, "layer_type": "basic", "out_features": ["stage4"]}
        },
        functools.partial(pictures, 64),
    ),
    "SegFormer": (
        "SegformerModel",
        "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
        | {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]},
        functools.partial(pictures, 32),
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
        functools.partial(pictures, 64),
    ),
}
BY_RULE = ("BERT", "RoBERTa", "GPT-2", "GPT-2, padded", "GPT", "LLaMA", "ViT")
BY_RULE += ("SigLIP", "Perceiver", "DETR", "SegFormer")
"""Those of which no module runs one sample at a time."""
TIMM = {
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "eca_nfnet_l0": {},
    "gcvit_xxtiny": {},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "maxvit_tiny_rw_224": {"img_size": 64},
    "mixer_s32_224": {},
    "nf_resnet26": {},
    "regnetx_002": {},
    "resnetv2_50x1_bit": {},
    "swinv2_cr_tiny_224": {
        "img_size": 64,
        "depths": (2, 1, 1, 1),
        "embed_dim": 16,
        "num_heads": (2, 2, 2, 2),
    },
    "tf_efficientnet_b0": {},
    "vit_relpos_base_patch32_plus_rpn_256": {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "vit_base_patch16_siglip_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
}
TIMM_APART = ("gcvit", "maxvit", "swinv2", "vit_relpos")
"""How the names begin of those with modules that run one sample at a time."""


def _image(channels: int, *sizes: int):
    return lambda: (torch.randn(SAMPLES, channels, *sizes, dtype=torch.double),)


def _noisy_image():
    return *_image(4, 16, 16)(), torch.arange(SAMPLES)


def _noisy_image_and_text():
    return *_noisy_image(), torch.randn(SAMPLES, 5, 12, dtype=torch.double)


MONAI = {
    "UNet": ((2, 1, 2, (4, 8, 16), (2, 2)), {"num_res_units": 2, "norm": "INSTANCE"}, _image(1, 32, 32)),
    "BasicUNet": ((3, 1, 2, (4, 4, 8, 8, 8, 4)), {}, _image(1, 32, 32, 32)),
    "SegResNet": ((2, 8, 1, 2), {"blocks_down": (1, 1), "blocks_up": (1,)}, _image(1, 16, 16)),
    "DynUNet": (
        (2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]),
        {"filters": [4, 8, 16], "deep_supervision": True},
        _image(1, 32, 32),
    ),
    "AttentionUnet": ((2, 1, 2, (4, 8, 16), (2, 2)), {}, _image(1, 32, 32)),
    "UNETR": (
        (1, 2, (32, 32)),
        {"feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 4, "spatial_dims": 2},
        _image(1, 32, 32),
    ),
    "SwinUNETR": (
        (1, 2),
        {"feature_size": 12, "spatial_dims": 2, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        _image(1, 64, 64),
    ),
    "VNet": ((2, 1, 2), {}, _image(1, 32, 32)),
    "DenseNet121": ((2, 1, 2), {}, _image(1, 32, 32)),
    "MedNeXt": (
        (2, 4, 1, 2),
        {"blocks_down": (1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1)},
        _image(1, 32, 32),
    ),
}
SEGMENTATION = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "UPerNet", "Segformer"),
)
DIFFUSERS = {
    "UNet2DModel": (
        {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16)}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "norm_num_groups": 4}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4},
        _noisy_image,
    ),
    "UNet2DConditionModel": (
        {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 12}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        _noisy_image_and_text,
    ),
    "AutoencoderKL": (
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        | {"block_out_channels": (8, 8), "norm_num_groups": 4},
        _image(3, 16, 16),
    ),
}


def quiet(model: nn.Module) -> nn.Module:
    """In float64, nothing at random, batch statistics constant."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "Drop" in type(module).__name__:
            module.eval()
    return model.double()


def check(model: nn.Module, loss_of, inputs, *, by_rule: bool = False) -> None:
    """Every parameter's gradients equal one backward per sample, to 1e-8 of their norm."""
    expected = grads_one_by_one(model, loss_of, inputs)
    with PerSampleGrads(model, "sum") as handle:
        loss_of(model, *inputs).backward()
        assert not (by_rule and handle.regions)
    whole = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    for path, p in model.named_parameters():
        if expected.get(path) is not None:  # neither frozen nor unused
            error = (p.grad_sample - expected[path]).norm()
            assert error <= 1e-8 * expected[path].norm() + 1e-12 * whole, path


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    library = pytest.importorskip("transformers", reason="transformers is not installed, and no requirement")
    model_class, config_class, options, batch = TRANSFORMERS[name]
    torch.manual_seed(0)
    config = getattr(library, config_class)(**options)
    config.use_cache = False
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    model = quiet(getattr(library, model_class)(config).train())
    names, inputs = zip(*batch().items(), strict=True)

    def loss_of(model, *inputs):
        return model(**dict(zip(names, inputs, strict=True)))[0].square().flatten(1).sum()

    check(model, loss_of, inputs, by_rule=name in BY_RULE)


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed, and no requirement")


@pytest.mark.parametrize("name", TIMM)
def test_timm(timm, name: str) -> None:
    torch.manual_seed(0)
    model = quiet(timm.create_model(name, num_classes=5, **TIMM[name]).train())
    size = TIMM[name].get("img_size", 224 if name.startswith(("gcvit", "mixer")) else 64)
    x = torch.randn(SAMPLES, 3, size, size, dtype=torch.double)
    by_rule = not name.startswith(TIMM_APART)
    check(model, lambda model, x: model(x).square().sum(), [x], by_rule=by_rule)


@pytest.mark.parametrize("name", ["lcnet_035", "mobileone_s0", "repvgg_a0", "rexnet_100", "mobilevitv2_050"])
def test_timm_with_batch_norms_replaced(timm, name: str) -> None:
    torch.manual_seed(0)
    model = quiet(_with_group_norms(timm.create_model(name, num_classes=5).train()))
    x = torch.randn(SAMPLES, 3, 64, 64, dtype=torch.double)
    check(model, lambda model, x: model(x).square().sum(), [x], by_rule=True)


def _with_group_norms(model: nn.Module) -> nn.Module:
    return PrivacyEngine.get_compatible_module(model)


def _check_images(model: nn.Module, inputs, *, by_rule: bool = True) -> None:
    def loss_of(model, *inputs):
        images = (t for t in tensors_in(model(*inputs)) if t.ndim > 1)
        return sum(t.square().sum() for t in images)

    check(quiet(_with_group_norms(model).train()), loss_of, inputs, by_rule=by_rule)


@pytest.mark.parametrize("name", MONAI)
def test_monai(name: str) -> None:
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed, and no requirement")
    torch.manual_seed(0)
    args, options, inputs = MONAI[name]
    _check_images(getattr(nets, name)(*args, **options), inputs(), by_rule=name != "SwinUNETR")


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation(name: str) -> None:
    library = pytest.importorskip(
        "segmentation_models_pytorch", reason="it is not installed, and no requirement"
    )
    torch.manual_seed(0)
    model = getattr(library, name)("resnet18", encoder_weights=None, classes=2)
    _check_images(model, _image(3, 64, 64)())


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name: str) -> None:
    library = pytest.importorskip("diffusers", reason="diffusers is not installed, and no requirement")
    torch.manual_seed(0)
    options, inputs = DIFFUSERS[name]
    _check_images(getattr(library, name)(**options), inputs())


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
)
def test_segmentation_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)
    _check_images(model, _image(3, 32, 32)())


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_videos_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    _check_images(getattr(video, name)(num_classes=3), _image(3, 4, 16, 16)())
