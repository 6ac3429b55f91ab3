import pytest

from patchsight_train.architecture import ResNetConfig, ViTConfig
from patchsight_train.pixel_decoder import patch_size


@pytest.mark.parametrize(("size", "p"), [(32, 4), (64, 8), (224, 28), (48, 6), (60, 10), (7, 1), (31, 31)])
def test_a_resnet_is_decoded_in_8_by_8_patches_where_they_divide_its_picture(size: int, p: int) -> None:
    assert patch_size(ResNetConfig(size)) == p
    assert size % p == 0


def test_a_vit_is_decoded_in_its_own_patches() -> None:
    assert patch_size(ViTConfig(48, 8)) == 8
