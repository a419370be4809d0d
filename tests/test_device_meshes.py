"""What `bench/devices.py` tells of devices that share a step: read from programs' texts, and estimated."""

import device_collectives
import device_meshes
import device_models
import device_report
import devices
import pytest
from presets import Model, size

SMALL = Model("small", "flux1", size(128, 128, 4), (), {"num_layers": 1, "num_single_layers": 1})
# As compilers for GPUs and TPUs write them, most of each line left out.
TEXT = """HloModule jit_transformer_layer, is_scheduled=true

%gemm (p0: bf16[576,3072], p1: bf16[9216,3072]) -> f32[576,9216] {
  %p0 = bf16[576,3072]{1,0} parameter(0)
  %p1 = bf16[9216,3072]{1,0} parameter(1)
  ROOT %dot.1 = f32[576,9216]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (x: bf16[8,1,576,3,128]) -> bf16[8,1,576,3,128] {
  %a = ((bf16[8,100]{1,0}), bf16[8,100]{1,0}) all-to-all-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}
  %a.done = bf16[8,100]{1,0} all-to-all-done(%a)
  %b = bf16[8,100]{1,0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %g = (bf16[10]{0}, bf16[80]{0}) all-gather-start(%x), replica_groups=mesh['x'=1,'y'=8] {'y'}
  %h = ((f32[3]{0}, f32[2]{0}), (f32[12]{0}, f32[8]{0})) all-gather-start(%x), \
replica_groups={{0,1,2,3},{4,5,6,7}}
  %r = f32[100]{0} all-reduce(%x), replica_groups=[1,2]<=[2], to_apply=%add
  %p = (bf16[50]{0}, bf16[50]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}
  %f = (bf16[1,3,4608,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v), \
custom_call_target="__cudnn$fmhaSoftmax", \
operand_layout_constraints={bf16[1,4608,3,128]{3,2,1,0}, bf16[1,512,3,128]{3,2,1,0}}
}
"""


def test_what_devices_send_is_read_from_the_program():
    sizes, often = device_collectives.sent(TEXT)
    assert sizes == {
        # To each of the others what is for it: 7 of 8 parts, 3 of 4.
        "all-to-all": 1600 * 7 // 8 + 1600 * 3 // 4,
        "all-gather": 7 * 20 + 3 * 20,
        "all-reduce": 400,
        "collective-permute": 100,
    }
    assert often == {"all-to-all": 2, "all-gather": 2, "all-reduce": 1, "collective-permute": 1}
    products, attention = 2 * 576 * 9216 * 3072, 4 * 4608 * 512 * 3 * 128
    assert device_collectives.flops(TEXT) == products + attention
    twice = device_collectives.in_all([TEXT, TEXT])
    assert twice["sent"]["all-reduce"] == 800
    assert twice["device_flops"] == 2 * (products + attention)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("replica_groups=[1,2]<=[2]", "replica_groups=?", "not understood"),
        ("ENTRY %main (x: bf16[8,1,576,3,128])", "%loop (x: s32[])", "in a loop"),
    ],
)
def test_what_is_not_understood_is_not_counted(old, new, said):
    text = TEXT.replace(old, new) + "  %w = (s32[]) while(%t), condition=%c, body=%loop\n"
    with pytest.raises(ValueError, match=said):
        device_collectives.sent(text)


def test_a_mesh_has_a_table(tmp_path, monkeypatch):
    """Twice the bytes take twice the time to send; where nothing is sent, no time is lost."""
    asked = []

    def ask(mesh, model, wanted):
        for program, digest in wanted.items():
            asked.append(program)
            sent = {"all-to-all": 0 if "8×8" in program else 36 * 10**7}
            told = {"digest": digest, "bytes": 3e9, "held": 2e9, "weights": 2e9, "chosen": True}
            products = {"flops": 8 * 593.4e9, "device_flops": 593.4e9}
            layers = {"layers": 2, "fused_layers": 2, "sent": sent, "collectives": {"all-to-all": 100}}
            yield program, told | products | layers

    monkeypatch.setattr(devices, "ask", ask)
    for module in (devices, device_report, device_meshes):
        monkeypatch.setattr(module, "MODELS", (SMALL,))
    assert devices.main(["--card", "h100-8"], tmp_path) == 0
    assert asked == []  # not one of those
    monkeypatch.setattr(device_models, "SPREAD", ("small",))
    for _ in range(2):
        assert devices.main(["--card", "h100-8"], tmp_path) == 0
    assert asked == ["denoise 8×8", "denoise 16×16"]
    text = (tmp_path / "devices.md").read_text()
    assert "593 TFLOP/s, 2.68 TB/s of memory, 360 GB/s to the others" in text
    [row] = [line for line in text.splitlines() if "small" in line]
    # Multiplying takes a millisecond, sending another.
    assert row == (
        "| small | whole, chosen | 2.00 | 3.00/3.00 | all | 0.00/0.36 | 100/100 | all-to-all 0.36 "
        "| 1.0/2.0 | 100%/50% | 50%/33% |"
    )
