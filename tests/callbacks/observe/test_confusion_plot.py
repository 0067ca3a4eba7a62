import torch

from project.callbacks.observe.confusion_plot import plot_confusion_matrix


def test_confusion_matrix_writes_the_counts_of_few_classes_and_names_of_many():
    matrix = torch.tensor([[8, 2], [0, 10]])
    axis = plot_confusion_matrix(matrix, ("cat", "dog")).axes[0]
    assert [text.get_text() for text in axis.texts] == ["8", "2", "10"]
    assert axis.get_title() == "18 of 20 right: 90.00%"
    assert torch.allclose(torch.as_tensor(axis.images[0].get_array()), torch.tensor([[0.8, 0.2], [0, 1]]).double())
    many = plot_confusion_matrix(torch.eye(100), [f"class {i}" for i in range(100)]).axes[0]
    assert not many.texts and len(many.get_xticklabels()) == 100
    assert plot_confusion_matrix(torch.zeros(3, 3), "abc").axes[0].get_title() == ""
