"""The computed tensor lists against the published checkpoints' own inventories."""

import hashlib

import pytest

from gemma_qat_kit import layouts
from gemma_qat_kit.architectures import GEMMA_SIZES, MOBILE_SIZES, drafter_config, hf_config
from gemma_qat_kit.errors import NotPublishedError, UnknownNameError

# sha256 over the sorted lines "name<tab>dtype<tab>shape" of the published files' headers, with the number of tensors.
INVENTORIES = {
    ("E2B", "bf16"): (2011, "e4d1fb3c4b5ff2bef28549a3da80958980072479f478b839e0341ddb21c6564c"),
    ("E2B", "w4a16"): (2504, "c74aa541218b0f1f289dcc58cf0ed980ad22cdb90b632dff3a978bfbebb7943d"),
    ("E2B", "mobile"): (2780, "a06ee7381d2fa0065343a813f310a5c28fb986ee943ad30c00b0929d4d5cbca3"),
    ("E2B", "gguf"): (541, "0430593e8d8eefc862046f0d7f20aaa98d838d8cc5e8a96d39c996bc6b373a1d"),
    ("E2B", "drafter"): (50, "434eafc3e9b1764a32c83ec06e692812b19275f7f38808b00e8cd5eef99499de"),
    ("E4B", "bf16"): (2130, "ed2d8e5503631d48b5572f22f982c602bd8d4551535cf730b1014677149a456e"),
    ("E4B", "w4a16"): (2763, "f97ae72b59a8f71657cbab5137865b4ec2133a095c97a5194c62af323fa02ff6"),
    ("E4B", "mobile"): (3104, "a0507e333e2a1ec149e6ae6ce44920cd3d797a2ea7facd444ca7c0a7bf5af217"),
    ("E4B", "gguf"): (666, "e4ff30991db65c7797900f7d77ffb17c0191f88cf9b7b16fab2614e30931dae3"),
    ("E4B", "drafter"): (50, "d996e270b1199b11c4780059d3a348e1d555014cdd063dba44ec947c908d0ed5"),
    ("12B", "bf16"): (677, "40899b7d99b836087c629b8f33d5ddc68f22de05b9e3bb892f7d9a8c009f6b5e"),
    ("12B", "w4a16"): (1334, "0e645dc1035b55de0ed4c5091be73773a5d83f5dcb277bd9275ec71e3d9cafc3"),
    ("12B", "gguf"): (667, "b5e2f04f456743cfe0b44558aca355da2a6ea485eaba058e1df4081c332f2b89"),
    ("12B", "drafter"): (48, "dce3cf0a3073703e5e8a4d11c2d67a47cafc39cb3444f962e479acaece3dff17"),
    ("26B-A4B", "bf16"): (1013, "028765ac33c66a5bcaec22a57b8314aa7c4c8572d47d45a9da81ace45a7269cb"),
    ("26B-A4B", "gguf"): (658, "7fa41c4ef1b98661206c618683957602c08514dc7fbbfcc706f08c631e586215"),
    ("26B-A4B", "drafter"): (48, "5e372aedc5e7a5d76e63b2635aee0256a304f9692d9a85c40461923ed09d8746"),
    ("31B", "bf16"): (1188, "d105ccd8132b03b675b9f2da3f8dbe814fee12cd33afcd1e0b956ce0bee817e0"),
    ("31B", "w4a16"): (2009, "b3196b8699c5d7d1a1cbc96c183b3dbad1d52880512d4dcab26f6a561c198876"),
    ("31B", "gguf"): (833, "8533db43e7c057b89f8c81ca355da1a5181d1c5af85265c16a0eba61046eea8b"),
    ("31B", "drafter"): (48, "c6432cf60d277b6ce5b32f2fa95df9f9a65617112b33d47531a6207cf4ee5a68"),
}


def tensors_of(size, layout):
    if layout == "drafter":
        return list(layouts.drafter_tensors(drafter_config(size)))
    config = hf_config(size, layout if layout in ("mobile", "w4a16") else "bf16")
    return list(getattr(layouts, f"{layout}_tensors")(config))


@pytest.mark.parametrize(("size", "layout"), INVENTORIES)
def test_tensor_list_equals_the_published_inventory(size, layout):
    lines = sorted(f"{t.name}\t{t.dtype}\t{list(t.shape)}" for t in tensors_of(size, layout))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest) == INVENTORIES[size, layout]


# "hub total" of the model pages; E2B and E4B there leave out 928 zero-dimensional clip bounds.
@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("E2B", 5_123_178_051),
        ("E4B", 7_996_156_490),
        ("12B", 11_959_730_224),
        ("26B-A4B", 25_805_936_206),
        ("31B", 31_273_088_876),
    ],
)
def test_parameter_count_equals_the_hubs(size, total):
    assert sum(t.num_values for t in tensors_of(size, "bf16") if t.shape) == total


def test_every_size_is_covered():
    assert {size for size, _ in INVENTORIES} == set(GEMMA_SIZES)
    assert {size for size, layout in INVENTORIES if layout == "mobile"} == set(MOBILE_SIZES)


def test_unknown_size_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="Did you mean 'E2B'"):
        hf_config("e2b")


@pytest.mark.parametrize(("size", "format"), [("26B-A4B", "w4a16"), ("12B", "mobile")])
def test_unpublished_combination_names_the_alternative(size, format):
    with pytest.raises(NotPublishedError, match="Take q4_0"):
        hf_config(size, format)
