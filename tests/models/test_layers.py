import pytest
import torch
from torch import nn

from project.models import BatchNorm, DropPath, GroupNorm, InstanceNorm, LayerNorm, NoNorm
from project.models.layers import ConvNormAct, check_images, check_sides, make_dropout, scale_widths, spatial_size

NORMS = [BatchNorm, GroupNorm, LayerNorm, InstanceNorm, NoNorm]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels", [1, 7, 12, 64])
def test_norms_take_any_width_and_keep_the_shape(norm: type[nn.Module], channels: int) -> None:
    maps = torch.randn(3, channels, 5, 4)
    assert norm(channels)(maps).shape == maps.shape


@pytest.mark.parametrize(
    ("norm", "dims"), [(BatchNorm, (0, 2, 3)), (LayerNorm, (1, 2, 3)), (InstanceNorm, (2, 3))], ids=lambda x: str(x)
)
def test_norms_give_zero_mean_and_unit_variance_over_their_dimensions(
    norm: type[nn.Module], dims: tuple[int, ...]
) -> None:
    maps = norm(6)(5 + 3 * torch.randn(4, 6, 8, 8))
    torch.testing.assert_close(maps.mean(dims), torch.zeros_like(maps.mean(dims)), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.var(dims, correction=0), torch.ones_like(maps.mean(dims)), atol=1e-3, rtol=0)


def test_group_norm_takes_the_greatest_number_of_groups_that_divides_the_width() -> None:
    assert [GroupNorm(channels).num_groups for channels in (8, 12, 20, 7, 300)] == [8, 4, 4, 1, 4]
    assert GroupNorm(12, num_groups=6).num_groups == 6


def test_instance_norm_keeps_what_a_1x1_map_says() -> None:
    norm = InstanceNorm(4)
    vectors = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(norm(vectors), vectors)
    norm(vectors).square().sum().backward()
    assert norm.weight.grad.abs().min() > 0, "the scale learns on 1x1 maps too"


def test_convolution_has_a_bias_only_without_a_norm() -> None:
    assert [ConvNormAct(3, 8, 3, norm=norm).conv.bias is not None for norm in NORMS] == [False] * 4 + [True]


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, (1, 7), (7, 1), (3, 1)])
def test_convolution_keeps_the_size_at_stride_1(kernel_size: int | tuple[int, int]) -> None:
    assert ConvNormAct(2, 3, kernel_size)(torch.randn(2, 2, 9, 8)).shape == (2, 3, 9, 8)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_spatial_size_is_that_of_a_convolution(stride: int, padding: int) -> None:
    for side in range(3, 12):
        maps = nn.Conv2d(1, 1, 3, stride, padding)(torch.zeros(1, 1, side, side))
        assert maps.shape[-1] == spatial_size(side, 3, stride, padding)


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.3)(torch.ones(20_000, 2, 2))
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    torch.testing.assert_close(per_sample[:, 0].unique(), torch.tensor([0.0, 1 / 0.7]))
    # The mean's standard deviation is sqrt(0.3 / 0.7 / 20000) = 0.0046.
    assert abs(dropped.mean().item() - 1) < 4 * 0.0046


def test_drop_path_is_the_identity_at_zero_and_in_eval() -> None:
    maps = torch.randn(4, 3, 2, 2)
    assert DropPath(0.0)(maps) is maps
    assert DropPath(0.9).eval()(maps) is maps
    assert isinstance(make_dropout(DropPath, 0.0, "conv_dropout"), nn.Identity)


@pytest.mark.parametrize(
    ("dropout", "dims"), [(nn.Dropout, ()), (nn.Dropout2d, (2, 3)), (DropPath, (1, 2, 3))], ids=lambda x: str(x)
)
def test_dropout_types_drop_elements_channels_and_branches(dropout: type[nn.Module], dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kept = make_dropout(dropout, 0.5, "conv_dropout")(torch.ones(200, 4, 3, 3)) != 0
    together = kept.float().mean(dims) if dims else kept.float()
    assert set(together.unique().tolist()) == {0.0, 1.0}, "what is dropped together is all kept or all dropped"
    apart = {nn.Dropout: (2, 3), nn.Dropout2d: (1,), DropPath: (0,)}[dropout]
    assert not set(kept.float().mean(apart).unique().tolist()) <= {0.0, 1.0}, "and the rest on its own"
    assert together.mean().item() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rates_outside_zero_to_one_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"conv_dropout is .* lies in \[0, 1\)"):
        make_dropout(nn.Dropout, rate, "conv_dropout")
    with pytest.raises(ValueError, match="p is"):
        DropPath(rate)


def test_widths_scale_to_multiples_of_eight() -> None:
    assert scale_widths((64, 24, 16), 1.0) == (64, 24, 16)
    assert scale_widths((64, 24, 16), 0.25) == (16, 8, 8)
    for width in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="width is"):
            scale_widths((64,), width)


def test_errors_name_the_net_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"images are \[2, 1, 8, 8\], but this Identity takes \[N, 3, 8, 8\]: resize"):
        check_images(torch.zeros(2, 1, 8, 8), (3, 8, 8), nn.Identity())
    with pytest.raises(ValueError, match=r"image_shape is \(1, 20, 90\), but Identity .* at least 32 pixels: resize"):
        check_sides((1, 20, 90), 32, nn.Identity())
