"""A net or a loss that does not fit the data is answered in one sentence before the first step."""

import pytest
import torch
from helpers.foreign_nets import Fixed, Lazy, NumOutputs, Pair, Untyped
from torch import nn

from project.losses import CrossEntropy
from project.models import Classifier
from project.models.net_check import channels_last_, check_loss, check_net
from project.models.signature import find


class OnlyInTraining(Untyped):
    """Further outputs in training alone, as nets with auxiliary heads have them."""

    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


REFUSED = {
    "channels": (Fixed(), (1, 8, 8), 10, ["Fixed", "takes 3 channels", "1x8x8"]),
    "classes": (Fixed(), (3, 8, 8), 7, ["Fixed", "gives 10 logits", "7 classes"]),
    "size": (nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), (3, 8, 8), 10, ["Sequential", "images 3x8x8"]),
    "tuple": (Pair(8), (3, 8, 8), 10, ["Pair", "gives a tuple", "[N, 10]"]),
    "tuple in training": (OnlyInTraining(8), (3, 8, 8), 10, ["OnlyInTraining", "in training it gives a tuple"]),
    "maps": (nn.Conv2d(3, 10, 3), (3, 8, 8), 10, ["Conv2d", "gives [N, 10, 6, 6]", "[N, 10]"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_sentence(case):
    net, image_shape, num_classes, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        check_net(net, image_shape, num_classes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) == 1


HINTS = {
    "an argument": (NumOutputs(5, 3), "helpers.foreign_nets.NumOutputs", "net_arguments: {num_outputs: num_classes}"),
    "channels": (NumOutputs(10, 1), "helpers.foreign_nets.NumOutputs", "net_arguments: {in_planes: num_channels}"),
    "**kwargs": (NumOutputs(10, 1), "helpers.foreign_nets.Keywords", "net_arguments: {in_chans: num_channels}"),
}


@pytest.mark.parametrize("case", HINTS)
def test_the_sentence_names_the_line_that_mends_it(case):
    net, class_path, line = HINTS[case]
    with pytest.raises(ValueError, match=r"model\.net is helpers.foreign_nets") as caught:
        check_net(net, (3, 8, 8), 10, {"class_path": class_path})
    assert line in str(caught.value)


def test_a_net_that_fits_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))
    net[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes, state = [module.training for module in net.modules()], torch.random.get_rng_state()
    check_net(net, (3, 8, 8), 10)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_lazy_layers_have_their_shapes_before_the_optimizer_is_made():
    torch.manual_seed(0)
    model = Classifier(Lazy(10), 10, (3, 8, 8))
    assert next(tuple(p.shape) for p in model.parameters()) == (8, 3, 3, 3)
    assert model.net.norm.num_batches_tracked == 0 and model.net.training
    with pytest.raises(ValueError, match="cannot take the data's images 3x1x1"):
        Classifier(Lazy(10), 10, (3, 1, 1))


def test_a_loss_is_tried_on_the_targets_that_it_will_get():
    for mixed in (False, True):
        check_loss(nn.CrossEntropyLoss(), 10, mixed)
        check_loss(CrossEntropy(0.1, class_weights=[1.0] * 10), 10, mixed)
    check_loss(nn.MultiMarginLoss(), 10, mixed=False)
    for loss, mixed, words in (
        (nn.MultiMarginLoss(), True, "mixed targets"),
        (nn.CrossEntropyLoss(reduction="none"), False, r"gives \[2\], not a scalar"),
        (CrossEntropy(class_weights=[1.0, 2.0]), False, "all 10 classes"),
    ):
        with pytest.raises(ValueError, match=words):
            check_loss(loss, 10, mixed)


AUXILIARY = {
    "torchvision.models.GoogLeNet": (32, "in training it gives a GoogLeNetOutputs"),
    "torchvision.models.googlenet": (32, "in training it gives a GoogLeNetOutputs"),
    "torchvision.models.Inception3": (96, "its auxiliary heads cannot take the data's images 3x96x96"),
}


@pytest.mark.parametrize("path", AUXILIARY)
def test_auxiliary_heads_are_refused_with_the_argument_that_leaves_them_out(path: str) -> None:
    """The heads of Inception v3 cannot take small images at all. In torchvision only training runs them."""
    side, problem = AUXILIARY[path]
    net = find(path)(num_classes=10, init_weights=False)
    with pytest.raises(ValueError, match=rf"{path}, and {problem}.*aux_logits: false"):
        check_net(net, (3, side, side), 10, {"class_path": path})


def test_a_net_with_3d_convolutions_is_stored_channels_last_where_that_exists():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(4, 2, 3), nn.Linear(2, 2))
    assert channels_last_(net) is net
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last) and not net[0].weight.is_contiguous()
    assert net[1].weight.is_contiguous()
    model = Classifier(net, 10, (3, 8, 8))
    model.setup("fit")
