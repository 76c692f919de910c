"""Angles are kept token by token, and a rotation can be turned back."""

import pytest

torch = pytest.importorskip("torch")

from runtime.rotary import Rotary, Rotation, rotate, unrotate  # noqa: E402

DIM = 16


def angles(positions, scaling=1.0, width=DIM):
    """Cosine and sine as Llama computes them, (batch, tokens, width)."""
    frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = positions[..., None].double() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return (angle.cos() * scaling).float(), (angle.sin() * scaling).float()


@pytest.mark.parametrize("width", [DIM, DIM // 2])
@pytest.mark.parametrize("scaling", [1.0, 1.37])
def test_turning_back_undoes_a_rotation_and_its_scaling(width, scaling):
    x = torch.randn(2, 3, 50, DIM, generator=torch.Generator().manual_seed(1))
    cos, sin = angles(torch.randint(0, 100_000, (2, 50), generator=torch.Generator().manual_seed(2)), scaling, width)
    turned = rotate(x, cos[:, None], sin[:, None])
    assert torch.allclose(unrotate(turned, cos[:, None], sin[:, None]), x, atol=2e-6)
    # A rotation keeps the length of what it turns, times the scaling, and leaves the other dimensions alone.
    assert torch.allclose(turned[..., :width].norm(dim=-1), scaling * x[..., :width].norm(dim=-1), rtol=1e-5)
    assert torch.equal(turned[..., width:], x[..., width:])


def test_a_rotation_by_complex_numbers():
    """(x1 + i x2) exp(i angle), the definition (Su et al. 2021), in float64."""
    x = torch.randn(1, 1, 7, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    position = torch.arange(7)[None]
    frequency = 10000.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    z = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * torch.exp(1j * position[0, :, None] * frequency)
    cos, sin = (part.double()[:, None] for part in angles(position))
    assert torch.allclose(rotate(x, cos, sin), torch.cat([z.real, z.imag], dim=-1), atol=1e-6)


def test_angles_are_found_by_token_in_each_row():
    rotary = Rotary(20, Rotation())
    first = torch.arange(6)[None]  # one row serves the batch, until rows differ
    rotary.extend(*angles(first))
    rows = torch.stack([torch.arange(6, 10), torch.arange(3, 7)])
    rotary.extend(*angles(rows))
    positions = torch.cat([first.expand(2, -1), rows], dim=1)
    wanted = torch.tensor([[0, 9, 4], [7, 1, 1]])
    for found, expected in zip(rotary.at(wanted), angles(positions.gather(1, wanted)), strict=True):
        assert torch.equal(found, expected)
    rotary.drop(2)
    rotary.extend(*angles(torch.tensor([[50], [60]])))
    assert torch.equal(rotary.at(torch.tensor([[8], [8]]))[0], angles(torch.tensor([[50], [60]]))[0])


def test_half_a_table_serves_both_halves():
    rotary, (cos, sin) = Rotary(5, Rotation(table="half")), angles(torch.arange(5)[None])
    rotary.extend(cos[..., : DIM // 2], sin[..., : DIM // 2])
    assert torch.equal(rotary.at(torch.arange(5)[None])[0], cos)
