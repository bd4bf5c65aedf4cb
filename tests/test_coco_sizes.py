"""Sizes of the pictures of COCO data sets, in the JSON file and in the image files."""

import numpy as np
import pytest
from coco_sets import (
    BOX,
    UNCHANGED,
    H,
    W,
    annotation,
    bounds,
    by_id,
    coco,
    opened,
    picture,
    settings,
    write,
)
from conftest import encoded
from PIL import Image, PngImagePlugin

from gptv_jax.data import sources
from gptv_jax.data.damage import DamageLog, DecodedSource
from gptv_jax.data.images import DamagedImageError, Decode


def turned(orientation: int, form: str = "PNG") -> bytes:
    """A picture of H x W as stored, with an EXIF orientation; "text": in the text of a PNG."""
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = orientation
    raw = exif.tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    own = {"pnginfo": text} if form == "text" else {"exif": raw}
    return encoded(picture(*BOX), "PNG" if form == "text" else form, **own)


@pytest.mark.parametrize("form", ["PNG", "text", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_fit_the_pixels_whichever_way_the_exif_orientation_turns(tmp_path, orientation, form):
    opened(tmp_path, coco(1))
    (tmp_path / "images/0001.png").write_bytes(content := turned(orientation, form))
    # The file is annotated as stored: its height and width are those before the turn.
    source = sources.open_source(settings(tmp_path), "train")
    record = DecodedSource(source, Decode())[0]
    assert record["image"].shape == (H, W, 3)
    np.testing.assert_array_equal(record["boxes"], [bounds(record["image"])])
    # The file is annotated as shown.
    (tmp_path / "0001.png").write_bytes(content)
    stored = picture(*BOX)
    across = stored.transpose(1, 0, 2)
    shown = {1: stored, 5: across, 6: np.rot90(stored, -1), 7: across[::-1, ::-1]}
    shown = shown.get(orientation, np.rot90(stored))
    y0, x0, y1, x1 = map(int, bounds(shown))
    own = coco(1)
    own["images"][0] |= {"height": shown.shape[0], "width": shown.shape[1]}
    own["annotations"][0]["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    write(tmp_path, {"train.json": own}, {})
    sources.open_data_set.cache_clear()
    record = DecodedSource(sources.open_source(settings(tmp_path), "train"), Decode())[0]
    np.testing.assert_array_equal(record["image"], shown)
    np.testing.assert_array_equal(record["boxes"], [[y0, x0, y1, x1]])


def test_a_picture_of_another_size_than_its_boxes_is_damaged(tmp_path, caplog):
    _, source = opened(tmp_path, coco())
    number = next(i for i in range(4) if source.image_id(i) == 3)
    (tmp_path / "images/0003.png").write_bytes(encoded(picture(*BOX, shape=(H + 9, W))))
    with pytest.raises(
        DamagedImageError, match=f"{W} x {H + 9} pixels, but train.json says {W} x {H}"
    ):
        source[number]
    decoded = DecodedSource(source, Decode())
    record = decoded[number]
    assert record["damaged"] == number  # another image is in its place
    log = DamageLog(settings(tmp_path, max_damaged=0.5), None)
    log.record("train", decoded, record["damaged"], 1)
    assert log.names == [str(tmp_path / "images/0003.png")]
    assert "so that its boxes would not fit" in caplog.text


def test_sizes_that_the_file_leaves_out_are_those_of_the_pictures(tmp_path):
    content = coco(2, annotations=(annotation(11, 1, bbox=[30, 20, 50, 50]),))
    for entry in content["images"]:
        entry["width"] = entry.pop("height") and None
    _, source = opened(tmp_path, content)
    np.testing.assert_array_equal(by_id(source)[1]["boxes"], [*UNCHANGED, [20, 30, H, W]])
    assert {len(source[i]["boxes"]) for i in range(2)} == {1, 2}


@pytest.mark.parametrize(("given", "told"), [(3e9, 3 * 10**9), (1e300, 2**62)])
def test_a_size_beyond_any_image_is_told_as_it_is(tmp_path, given, told):
    content = coco(1)
    content["images"][0]["height"] = given
    with pytest.raises(DamagedImageError, match=f"train.json says {W} x {told}, so"):
        opened(tmp_path, content)[1][0]
