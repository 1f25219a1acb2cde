"""The zoo's models of torchvision and timm: the smallest of each family, made smaller where it takes its sizes.

They belong in an environment of their own, for PyPI's torchvision is linked to CUDA:

    python -m venv vision-env
    vision-env/bin/pip install -c constraints.txt torch==2.13.0 numpy scipy pillow accelerate transformers
    vision-env/bin/pip install -c constraints.txt safetensors huggingface_hub pyyaml
    vision-env/bin/pip install --no-deps torchvision==0.28.0 timm==1.0.31
    vision-env/bin/python -m tests.zoo.survey --families torchvision timm
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.zoo.specimen import Inputs, Specimen, floats

NUM_CLASSES = 10
Maker = Callable[[Any], nn.Module]
_schemas: list[torch.library.Library] = []


def import_torchvision() -> Any:
    """Torchvision, also where its compiled operators do not load.

    Its Python code describes `nms` and `qnms` to torch while it is imported, which fails if nothing has defined them. A
    definition without code is enough for all models that never call them: everything but detectors.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # Definitions last as long as the library that made them.
        _schemas.append(library)
        return importlib.import_module("torchvision")


def import_timm() -> Any:
    """Timm, which imports torchvision."""
    import_torchvision()
    return importlib.import_module("timm")


@dataclass(frozen=True)
class Model:
    """One line of a table."""

    name: str
    make: Maker
    """From the library's module."""
    inputs: Inputs
    whole: bool = False
    """Its constructor computes buffers beside its weights, so only with weights do they come out right."""


def images(*sides: int, frames: tuple[int, ...] = (), names: tuple[str, ...] = ("image",)) -> Inputs:
    """Square images of the first side for 16 tokens, of the last for fewer."""

    def side(length: int) -> int:
        return sides[0] if length >= 16 else sides[-1]

    sizes = (3, *frames, *((side, side) if len(sides) > 1 else (sides[0], sides[0])))
    return functools.reduce(Inputs.__or__, (floats(name, *sizes) for name in names))


ANY, ONE = images(64, 32), images(64)


def named(name: str, inputs: Inputs = ANY, /, whole: bool = False, **sizes: Any) -> Model:
    """A model that timm knows by name, at the sizes that its constructor takes."""

    def make(timm: Any) -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **sizes)

    return Model(name, make, inputs, whole)


def narrowed(model: nn.Module, width: int = 64) -> nn.Module:
    """A model whose classifier has hidden layers of this width: they are nearly all of AlexNet and VGG."""
    classifier = model.classifier
    places = [place for place, layer in enumerate(classifier) if isinstance(layer, nn.Linear)]
    features = [classifier[places[0]].in_features, *[width] * (len(places) - 1), classifier[places[-1]].out_features]
    for place, before, after in zip(places, features[:-1], features[1:], strict=True):
        classifier[place] = nn.Linear(before, after)
    return model


def _convnext(tv: Any) -> nn.Module:
    stages = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
    return tv.models.ConvNeXt([tv.models.convnext.CNBlockConfig(*stage) for stage in stages], num_classes=NUM_CLASSES)


def _efficientnet_v2(tv: Any) -> nn.Module:
    parts = tv.models.efficientnet
    stages = [
        parts.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        parts.FusedMBConvConfig(4, 3, 2, 8, 16, 2),
        parts.MBConvConfig(4, 3, 2, 16, 24, 2),
        parts.MBConvConfig(6, 3, 2, 24, 32, 2),
    ]
    return tv.models.EfficientNet(stages, 0.2, num_classes=NUM_CLASSES, last_channel=64)


def _mvit(tv: Any) -> nn.Module:
    block = functools.partial(tv.models.video.mvit.MSBlockConfig, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3])
    return tv.models.video.MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=[
            block(num_heads=1, input_channels=16, output_channels=16, stride_q=[1, 1, 1], stride_kv=[1, 2, 2]),
            block(num_heads=2, input_channels=16, output_channels=32, stride_q=[1, 2, 2], stride_kv=[1, 1, 1]),
            block(num_heads=2, input_channels=32, output_channels=32, stride_q=[1, 1, 1], stride_kv=[1, 1, 1]),
        ],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=NUM_CLASSES,
    )


def _resnet(tv: Any, block: str, **sizes: Any) -> nn.Module:
    return tv.models.ResNet(getattr(tv.models.resnet, block), [1, 1, 1, 1], num_classes=NUM_CLASSES, **sizes)


def _plain(name: str, **keywords: Any) -> Maker:
    return lambda tv: tv.models.get_model(name, weights=None, num_classes=NUM_CLASSES, **keywords)


WINDOWS = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": [4, 4]}

TORCHVISION = [
    Model("alexnet", lambda tv: narrowed(tv.models.alexnet(num_classes=NUM_CLASSES)), images(64, 96)),
    Model("convnext_tiny", _convnext, ANY),
    Model("deeplabv3_mobilenet_v3_large", _plain("deeplabv3_mobilenet_v3_large", weights_backbone=None), ANY),
    Model(
        "densenet121",
        lambda tv: tv.models.DenseNet(8, (2, 2, 2, 2), num_init_features=16, num_classes=NUM_CLASSES),
        ANY,
    ),
    Model("efficientnet_b0", _plain("efficientnet_b0"), ANY),
    Model("efficientnet_v2_s", _efficientnet_v2, ANY),
    Model("googlenet", _plain("googlenet", init_weights=False), ANY),
    Model("inception_v3", _plain("inception_v3", init_weights=False), images(96, 80)),
    Model("lraspp_mobilenet_v3_large", _plain("lraspp_mobilenet_v3_large", weights_backbone=None), ANY),
    Model(
        "maxvit_t",
        lambda tv: tv.models.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=NUM_CLASSES),
        ONE,
    ),
    Model(
        "mc3_18",
        lambda tv: tv.models.video.VideoResNet(
            tv.models.video.resnet.BasicBlock,
            [tv.models.video.resnet.Conv3DSimple] + [tv.models.video.resnet.Conv3DNoTemporal] * 3,
            [1, 1, 1, 1],
            tv.models.video.resnet.BasicStem,
            num_classes=NUM_CLASSES,
        ),
        images(64, 32, frames=(4,)),
    ),
    Model("mnasnet0_5", _plain("mnasnet0_5"), ANY),
    Model("mobilenet_v2_0_25", _plain("mobilenet_v2", width_mult=0.25), ANY),
    Model("mobilenet_v3_small", _plain("mobilenet_v3_small"), ANY),
    Model("mvit_v2_s", _mvit, images(32, frames=(4,))),
    Model("raft_small", lambda tv: tv.models.optical_flow.raft_small(), images(128, 136, names=("first", "second"))),
    Model("regnet_x_400mf", _plain("regnet_x_400mf"), ANY),
    Model("regnet_y_400mf", _plain("regnet_y_400mf"), ANY),
    Model("resnet18", lambda tv: _resnet(tv, "BasicBlock"), ANY),
    Model("resnet50", lambda tv: _resnet(tv, "Bottleneck"), ANY),
    Model("resnext50_32x4d", lambda tv: _resnet(tv, "Bottleneck", groups=32, width_per_group=4), ANY),
    Model("shufflenet_v2_x0_5", _plain("shufflenet_v2_x0_5"), ANY),
    Model("squeezenet1_0", _plain("squeezenet1_0"), ANY),
    Model("squeezenet1_1", _plain("squeezenet1_1"), ANY),
    Model(
        "swin3d_t",
        lambda tv: tv.models.video.SwinTransformer3d([2, 4, 4], 16, [1, 2], [2, 4], [2, 4, 4], num_classes=NUM_CLASSES),
        images(64, 32, frames=(4,)),
    ),
    Model("swin_t", lambda tv: tv.models.SwinTransformer(**WINDOWS, num_classes=NUM_CLASSES), ANY),
    Model(
        "swin_v2_t",
        lambda tv: tv.models.SwinTransformer(
            **WINDOWS,
            num_classes=NUM_CLASSES,
            block=tv.models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=tv.models.swin_transformer.PatchMergingV2,
        ),
        ANY,
    ),
    Model("vgg11", lambda tv: narrowed(tv.models.vgg11(num_classes=NUM_CLASSES, init_weights=False)), ANY),
    Model("vgg11_bn", lambda tv: narrowed(tv.models.vgg11_bn(num_classes=NUM_CLASSES, init_weights=False)), ANY),
    Model("vit_b_16", lambda tv: tv.models.VisionTransformer(64, 16, 3, 4, 32, 64, num_classes=NUM_CLASSES), ONE),
]

VIT = {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 4}
STAGES = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
WIDTHS = (16, 32, 64, 128)
SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}

TIMM = [
    named("beit_base_patch16_224", ONE, **VIT),
    named("cait_xxs24_224", ONE, img_size=64, depth=3, embed_dim=48),
    named("coat_lite_tiny", ONE, img_size=64),
    named("coat_tiny", ONE, img_size=64),
    named("convit_tiny", ONE, img_size=64, depth=3, local_up_to_layer=2),
    Model("convmixer_768_32", lambda timm: timm.models.ConvMixer(dim=32, depth=4, num_classes=NUM_CLASSES), ANY),
    named("cpubone_nano"),
    named("crossvit_tiny_240", images(240)),
    named("cs3darknet_focus_s"),
    named("csatv2", images(64, 96)),
    named("cspnext_tiny"),
    named("davit_tiny", embed_dims=WIDTHS, **STAGES),
    named("deit_tiny_distilled_patch16_224", ONE, img_size=64, depth=3),
    named("dla46_c"),
    named("dpn48b"),
    named("edgenext_xx_small"),
    named("efficientformer_l1", images(224)),
    named("efficientformerv2_s0", ONE, img_size=64),
    named("efficientvim_m1"),
    named("efficientvit_b0"),
    named("efficientvit_m0", ONE, img_size=64),
    named("ese_vovnet19b_slim_dw"),
    named("eva02_tiny_patch14_224", images(56), img_size=56, depth=3),
    named("fasternet_t0"),
    named("fastvit_t8"),
    Model(
        "focalnet_tiny_srf",
        lambda timm: timm.models.FocalNet(embed_dim=16, depths=(1, 1, 1, 1), num_classes=NUM_CLASSES),
        ANY,
    ),
    Model(
        "gcvit_xxtiny",
        lambda timm: timm.models.GlobalContextVit(
            img_size=64,
            embed_dim=16,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 4),
            window_ratio=(16, 16, 32, 32),
            num_classes=NUM_CLASSES,
        ),
        ONE,
    ),
    named("gemma4_vit_167m", **VIT),
    named("ghostnet_050"),
    Model(
        "gmlp_ti16_224",
        lambda timm: timm.models.MlpMixer(
            img_size=64,
            num_blocks=3,
            embed_dim=32,
            mlp_ratio=4,
            block_layer=timm.models.mlp_mixer.SpatialGatingBlock,
            mlp_layer=timm.layers.GatedMlp,
            num_classes=NUM_CLASSES,
        ),
        ONE,
    ),
    named("hardcorenas_a"),
    named("hgnetv2_b0"),
    named("hiera_tiny_224", ONE, img_size=64, embed_dim=16, stages=(1, 1, 1, 1)),
    named("hrnet_w18_small"),
    named("iformer_t"),
    named("inception_next_atto"),
    named("lcnet_035"),
    named("lcnetv2_small"),
    named("legacy_seresnet18", layers=(1, 1, 1, 1)),
    named("levit_128s", ONE, img_size=64),
    Model(
        "mixer_s32_224",
        lambda timm: timm.models.MlpMixer(img_size=64, num_blocks=3, embed_dim=32, num_classes=NUM_CLASSES),
        ONE,
    ),
    named("lowformer_b0"),
    named("mobilenetv2_035"),
    named("mobilenetv3_small_050"),
    named("mobilenetv4_conv_small_035"),
    named("mobilevit_xxs"),
    named("mobilevitv2_050"),
    Model(
        "mvitv2_tiny",
        lambda timm: timm.models.MultiScaleVit(
            timm.models.mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=16), img_size=64, num_classes=NUM_CLASSES
        ),
        ONE,
    ),
    named("naflexvit_base_patch16_gap", depth=3, embed_dim=64, num_heads=4),
    Model(
        "nest_tiny",
        lambda timm: timm.models.Nest(
            img_size=64, embed_dims=(16, 32, 64), num_heads=(1, 2, 4), depths=(1, 1, 2), num_classes=NUM_CLASSES
        ),
        ONE,
    ),
    named("nf_regnet_b0"),
    Model(
        "pit_ti_224",
        lambda timm: timm.models.PoolingVisionTransformer(
            64, 16, 8, "overlap", (16, 16, 16), (1, 1, 1), (1, 2, 4), 2.0, num_classes=NUM_CLASSES
        ),
        ONE,
    ),
    Model(
        "poolformer_s12",
        lambda timm: timm.models.MetaFormer(
            depths=(1, 1, 1, 1), dims=WIDTHS, token_mixers=timm.models.metaformer.Pooling, num_classes=NUM_CLASSES
        ),
        ANY,
    ),
    Model(
        "caformer_s18",
        lambda timm: timm.models.MetaFormer(
            depths=(1, 1, 1, 1),
            dims=WIDTHS,
            token_mixers=[timm.models.metaformer.SepConv] * 2 + [timm.models.metaformer.Attention] * 2,
            norm_layers=[timm.models.metaformer.LayerNorm2dNoBias] * 2 + [timm.models.metaformer.LayerNormNoBias] * 2,
            num_classes=NUM_CLASSES,
        ),
        ANY,
    ),
    named("pvt_v2_b0"),
    named("qwen3_vit_88m", **VIT),
    named("regnetx_002"),
    named("regnety_002"),
    named("repghostnet_050"),
    named("repvit_m0_9"),
    named("res2net50_14w_8s", layers=(1, 1, 1, 1)),
    Model(
        "resmlp_12_224",
        lambda timm: timm.models.MlpMixer(
            img_size=64,
            num_blocks=3,
            embed_dim=32,
            mlp_ratio=4,
            block_layer=timm.models.mlp_mixer.ResBlock,
            norm_layer=timm.models.mlp_mixer.Affine,
            num_classes=NUM_CLASSES,
        ),
        ONE,
    ),
    named("resnest14d"),
    named("resnet10t"),
    named("resnetv2_18", layers=(1, 1, 1, 1), channels=WIDTHS),
    named("rexnet_100", width_mult=0.5),
    Model(
        "sam2_hiera_tiny",
        lambda timm: timm.models.hieradet_sam2.HieraDet(
            embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), global_att_blocks=(3,), num_classes=NUM_CLASSES
        ),
        ANY,
    ),
    named("samvit_base_patch16_224", **VIT, global_attn_indexes=(1,)),
    named("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), hidden_sizes=(4, 8, 8, 8)),
    named("shvit_s1"),
    named("skresnet18", layers=(1, 1, 1, 1)),
    named("starnet_s050"),
    named("swiftformer_xs"),
    named("swin_tiny_patch4_window7_224", ONE, whole=True, **SWIN),
    named("swinv2_cr_tiny_224", ONE, whole=True, **SWIN),
    named("swinv2_tiny_window8_256", ONE, whole=True, **SWIN),
    named("test_byobnet"),
    named("test_coatnet", images(160)),
    named("test_convnext"),
    named("test_efficientnet"),
    named("test_mambaout"),
    named("test_maxvit", images(160)),
    named("test_nfnet"),
    named("test_resnet"),
    named("test_vit", img_size=64),
    named("test_vit_relpos", ONE, img_size=64),
    named("tiny_vit_5m_224", images(224)),
    named("tnt_s_patch16_224", ONE, img_size=64, depth=3),
    named("tresnet_m", layers=(1, 1, 1, 1), width_factor=0.25),
    named("twins_pcpvt_small", img_size=64, embed_dims=WIDTHS, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    named("twins_svt_small", img_size=64, embed_dims=WIDTHS, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    named("visformer_tiny", ONE, img_size=64, depth=(1, 1, 1), embed_dim=32),
    named("vit_tiny_r_s16_p8_224", ONE, whole=True, img_size=64, depth=3),
    Model(
        "volo_d1_224",
        lambda timm: timm.models.VOLO(
            layers=(1, 1, 1, 1),
            img_size=64,
            embed_dims=(32, 64, 64, 64),
            num_heads=(2, 4, 4, 4),
            num_classes=NUM_CLASSES,
        ),
        ONE,
    ),
    named("xcit_nano_12_p16_224", img_size=64, depth=3),
]

LEFT_OUT = {
    "torchvision": {
        "detection": "detectors need compiled operators (nms, roi_align)",
        "quantized": "their weights are quantized",
        "r3d_18": "57 MB with one block a stage; mc3_18 is of the same class",
        "r2plus1d_18": "50 MB with one block a stage; mc3_18 is of the same class",
        "s3d": "takes videos of 224 pixels: seconds a run",
        "wide_resnet50_2": "resnet50 in other widths",
    },
    "timm": {
        "byoanet": "lambda networks reach 1e25 on random weights, halo networks take 256 pixels: seconds a run",
        "deepseek_vit": "1.6 GB in its smallest variant",
        "inception_resnet_v2": "217 MB in its smallest variant",
        "inception_v3 of timm": "torchvision's is there",
        "inception_v4": "165 MB in its smallest variant",
        "mobilenetv5": "322 MB in its smallest variant",
        "nasnet": "339 MB in its smallest variant",
        "nextvit": "123 MB in its smallest variant",
        "pnasnet": "327 MB in its smallest variant",
        "rdnet": "91 MB in its smallest variant",
        "selecsls": "116 MB in its smallest variant",
        "vgg of timm": "torchvision's is there",
        "vitamin": "87 MB in its smallest variant",
        "xception": "83 MB in its smallest variant",
        "xception_aligned": "100 MB in its smallest variant",
    },
}
"""By family, what no table has."""

FAMILIES = {"torchvision": (import_torchvision, TORCHVISION), "timm": (import_timm, TIMM)}


def build(family: str, model: Model) -> nn.Module:
    """The model of a line."""
    load, _ = FAMILIES[family]
    return model.make(load()).eval()


def hollow(family: str, model: Model) -> nn.Module:
    """The model of a line, built whole, and its weights then taken away."""
    whole = build(family, model)
    empty: dict[int, nn.Parameter] = {}
    for module in whole.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = empty.setdefault(id(weight), nn.Parameter(weight.to("meta")))
    return whole


def resolve(family: str) -> tuple[list[Specimen], dict[str, str]]:
    """Specimens of what this environment has, and the reason for each that it has not."""
    load, table = FAMILIES[family]
    try:
        load()
    except (ImportError, RuntimeError) as error:
        return [], {model.name: f"{family} cannot be imported: {error}" for model in table}
    found = [
        Specimen(
            model.name,
            family,
            "vision",
            functools.partial(build, family, model),
            functools.partial(positions, model.inputs),
            skeleton=functools.partial(hollow, family, model) if model.whole else None,
            fixed_length=model.inputs.fixed_length,
        )
        for model in table
    ]
    return found, LEFT_OUT[family]


def positions(inputs: Inputs, batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """What these models are called with: images by position."""
    return tuple(inputs.make(batch, length).values())
