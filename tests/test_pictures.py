"""nullspace/pictures.py and captions.py: what is read as which picture and caption, and what is refused."""

import json
import shutil
import struct
import weakref
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nullspace.pictures as rooms
import train_dreambooth_nullspace as trainer
from nullspace.captions import trained_prompts
from nullspace.errors import NullSpaceError
from nullspace.pictures import checkpoint_grid, comparison_grid, fit, read_instances, save_picture
from world import FOLDER


STAR = FOLDER / "star"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def read(folder, prompt="p", column=None, **options):
    """Pictures, captions and the lines that were told."""
    args = SimpleNamespace(
        instance_data_dir=folder,
        dataset_name=None,
        instance_prompt=[prompt] if isinstance(prompt, str) else prompt,
        caption_column=column,
    )
    lines = []
    pictures, captions = read_instances(args, tell=lines.append, **options)
    return pictures, captions, "\n".join(lines)


def read_rows(folder, tmp_path, prompt="p", column="text", **options):
    """The same from a dataset."""
    args = SimpleNamespace(
        dataset_name=str(folder),
        dataset_config_name=None,
        cache_dir=tmp_path / "cache",
        image_column="image",
        caption_column=column,
        instance_prompt=[prompt] if prompt else None,
    )
    lines = []
    pictures, captions = read_instances(args, tell=lines.append, **options)
    return pictures, captions, "\n".join(lines)


def refusal(call, *args, **options):
    with pytest.raises(NullSpaceError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shades(picture):
    assert picture.mode == "RGB"
    values = np.asarray(picture)
    assert (values == values[..., :1]).all()
    return values[..., 0].flatten().tolist()


def instances(folder, count=3):
    """A folder of the first pictures of a subject."""
    folder.mkdir(parents=True)
    for number in range(count):
        shutil.copy(STAR / f"{number}.png", folder)
    return folder


# ---- Modes and ranges ------------------------------------------------------------------------------------------------


RAMP = np.array([[0, 257 * 64, 257 * 128, 65535]])


def save_ramp(path, dtype):
    values = RAMP / 65535 if dtype == np.float32 else RAMP
    Image.fromarray(values.astype(dtype)).save(path)


def save_pgm(path, dtype):
    path.write_bytes(b"P5 4 1 65535\n" + RAMP.astype(">u2").tobytes())


@pytest.mark.parametrize(
    ("name", "save", "dtype"),
    [
        ("a.png", save_ramp, np.uint16),
        ("a.tif", save_ramp, np.uint16),
        ("big-endian.tif", save_ramp, ">u2"),
        ("float.tif", save_ramp, np.float32),
        ("a.pgm", save_pgm, None),
    ],
)
def test_pictures_of_more_than_8_bits_keep_their_shades(name, save, dtype, tmp_path):
    save(tmp_path / name, dtype)
    (picture,), _, _ = read(tmp_path)
    assert shades(picture) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0, 70000]], np.int32), "32-bit integers, whose white is not known"),
        (np.array([[0, 255]], np.float32), "floats from 0 to 255 rather than in [0, 1]"),
        (np.array([[0, np.nan]], np.float32), "rather than in [0, 1]"),
    ],
)
def test_ranges_that_are_not_known_are_refused(values, words, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    message = refusal(read, tmp_path)
    assert words in message and "a.tif" in message


def test_transparency_is_laid_on_the_background(tmp_path):
    """In each of the modes that have it, whatever colour the transparent pixels hide."""
    hidden = np.full((1, 2, 4), 77, np.uint8)
    hidden[0, :, 3] = 0, 255
    rgba = Image.fromarray(hidden)
    rgba.save(tmp_path / "a.png")
    rgba.convert("LA").save(tmp_path / "b.png")
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 77, 77, 77])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "c.png", transparency=0)
    palette.save(tmp_path / "d.gif", transparency=0)
    grey = Image.fromarray(np.array([[9, 77]], np.uint8))
    grey.save(tmp_path / "e.png", transparency=9)
    grey.convert("RGB").save(tmp_path / "f.png", transparency=(9, 9, 9))
    Image.fromarray(np.array([[9 * 257, 77 * 257]], np.uint16)).save(tmp_path / "g.png", transparency=9 * 257)
    for background, expected in ((WHITE, [255, 77]), (BLACK, [0, 77])):
        pictures, _, _ = read(tmp_path, background=background)
        assert [shades(picture) for picture in pictures] == [expected] * 7


def test_background_is_a_colour(capsys):
    line = ["--pretrained_model_name_or_path", "m", "--nullspace_name_or_path", "b", "--instance_data_dir", "d"]
    assert trainer.parse_args(line).background == WHITE
    assert trainer.parse_args([*line, "--background", "#102030"]).background == (16, 32, 48)
    with pytest.raises(SystemExit):
        trainer.parse_args([*line, "--background", "see-through"])
    assert "--background" in capsys.readouterr().err


def test_pictures_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown a quarter to the right
    for name, values in (("a.png", np.array([[0, 255]], np.uint8)), ("b.png", np.array([[0, 65535]], np.uint16))):
        Image.fromarray(values).save(tmp_path / name, exif=exif)
    pictures, _, _ = read(tmp_path)
    assert [picture.size for picture in pictures] == [(1, 2)] * 2
    assert [shades(picture) for picture in pictures] == [[0, 255]] * 2


def test_ordinary_pictures_are_trained_on_as_ever(tmp_path):
    """Bit for bit as resizing the whole RGB picture in the data set does."""
    Image.effect_noise((90, 61), 90).convert("RGB").save(tmp_path / "a.jpg")
    line = ["--pretrained_model_name_or_path", "m", "--nullspace_name_or_path", "b", "--instance_data_dir", "d"]
    args = trainer.parse_args([*line, "--resolution", "32", "--seed", "0"])
    whole = Image.open(tmp_path / "a.jpg").convert("RGB").resize((47, 32), Image.Resampling.LANCZOS)
    (kept,), _, _ = read(tmp_path, keep=lambda picture: fit(picture, [(32, 32)], "lanczos"))
    assert kept.tobytes() == whole.tobytes()
    given = [trainer.InstanceDataset([picture], [[0]], args)[0][0] for picture in (whole, kept)]
    assert torch.equal(*given)


def test_one_picture_at_a_time_is_whole(tmp_path):
    for number in range(4):
        Image.new("RGB", (400, 300)).save(tmp_path / f"{number}.png")
    alive = []

    def keep(picture):
        assert not any(whole() for whole in alive)
        alive.append(weakref.ref(picture))
        return fit(picture, [(30, 30)], "lanczos")

    pictures, _, _ = read(tmp_path, keep=keep)
    assert len(alive) == 4 and {picture.size for picture in pictures} == {(40, 30)}


# ---- What cannot be read ---------------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that promises a size and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_all_that_cannot_be_read_is_named_in_one_message(tmp_path, monkeypatch):
    without_heic = Image.registered_extensions().keys() - set(rooms.HEIC_ENDINGS)
    monkeypatch.setattr(rooms, "register_heic", lambda: None)
    monkeypatch.setattr(rooms, "known", lambda: without_heic)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bomb.png").write_bytes(png_header(20000, 10000))
    (tmp_path / "cut.png").write_bytes((STAR / "0.png").read_bytes()[:500])
    (tmp_path / "nothing.jpg").touch()
    (tmp_path / "text.jpg").write_text("not found")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    (tmp_path / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    (tmp_path / "camera.nef").write_bytes(bytes(200))
    (tmp_path / "gone.png").symlink_to(tmp_path / "elsewhere.png")
    Image.new("RGB", (4000, 1)).save(tmp_path / "line.png")
    message = refusal(read, tmp_path)
    for name, why in {
        "bomb.png": "more than 178,956,970 pixels",
        "cut.png": "damaged or not readable",
        "nothing.jpg": "an empty file",
        "text.jpg": "damaged, or no picture",
        "phone.HEIC": "HEIC needs pillow-heif: pip install pillow-heif",
        "renamed.jpg": "HEIC needs pillow-heif: pip install pillow-heif",
        "camera.nef": "raw files of cameras",
        "gone.png": "No such file",
        "line.png": "4000 x 1 pixels, more than 10 times as long as wide",
    }.items():
        assert f"{name} cannot be read ({why}" in message.replace("damaged or not readable: [Errno 2] ", "")
    assert "good.png" not in message and "9 of 10" in message


def test_heic_is_read_where_its_plug_in_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(tmp_path / "IMG_1.HEIC")
    (picture,), _, _ = read(tmp_path)
    assert picture.size == (64, 48) and picture.getpixel((5, 5))[0] > 240


def test_hidden_files_are_counted_in_one_line(tmp_path):
    instances(tmp_path / "star")
    for name in ("._0.png", ".trashed-1700000000-b.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "star" / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "star" / "live.mov").touch()
    pictures, _, told = read(tmp_path / "star")
    assert len(pictures) == 3
    first, second = told.splitlines()
    assert "4 hidden files" in first and "._0.png" in first and "live.mov" in second


# ---- Captions --------------------------------------------------------------------------------------------------------


def test_captions_beside_pictures_beat_metadata_and_the_prompt(tmp_path):
    folder = instances(tmp_path / "star")
    (folder / "0.txt").write_bytes(b"\xef\xbb\xbfof its own \nand more\n")
    (folder / "1.caption").write_text("in utf-16", encoding="utf-16")
    rows = [{"file_name": f"{number}.png", "text": f"row {number}"} for number in (0, 2, 7)]
    rows += [{"file_name": "2.png", "text": "another of it"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, captions, told = read(folder)
    assert captions == [["of its own"], ["in utf-16"], ["row 2", "another of it"]]
    assert "--instance_prompt is not used" in told and "several lines" in told and "1 file not there: 7.png" in told
    assert trained_prompts(captions, ["p"]) == ["of its own", "in utf-16", "row 2", "another of it"]
    assert read(folder, None, need_captions=True)[1] == captions


def test_pictures_without_a_caption_have_the_prompt_or_are_refused(tmp_path):
    folder = instances(tmp_path / "star")
    (folder / "0.txt").write_text("of its own")
    _, captions, told = read(folder, ["p", "q"])
    assert captions == [["of its own"], ["p", "q"], ["p", "q"]]
    assert "1 from .txt files, 2 from --instance_prompt" in told
    message = refusal(read, folder, None, need_captions=True)
    assert "(1.png, 2.png)" in message and "--instance_prompt" in message and "text file" in message
    (folder / "1.txt").write_text("\n")
    (folder / "2.txt").write_bytes(b"\xff\xf0\x81")
    message = refusal(read, folder)
    assert "1.txt has no caption" in message and "2.txt cannot be read as text" in message


def test_a_run_without_prompt_and_captions_is_refused_before_a_model(tmp_path):
    line = ["--pretrained_model_name_or_path", "/nowhere", "--nullspace_name_or_path", "/nowhere"]
    line += ["--instance_data_dir", str(instances(tmp_path / "star")), "--output_dir", str(tmp_path / "lora")]
    with pytest.raises(NullSpaceError, match="without a caption"):
        trainer.main(trainer.parse_args([*line, "--report_to", "none", "--resolution", "32"]))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"file_name": "0.png"}\n{"file_name": "1.png", "text": 1}', "Row 1 of {0}, 'text', is a number (1)"),
        ('{"file_name": "0.png", "text": ["a"]}', "is a list, not text"),
        ('{"file_name": "0.png", "text": {"a": 1}}', "is a dict, not text"),
        ('{"file_name": "0.png", "text": "a"', "Row 0 of {0} is not JSON"),
        ('["0.png", "a"]', "is not an object"),
        ('{"text": "a"}', "has no file_name"),
    ],
)
def test_metadata_that_cannot_be_used_is_named_with_its_row(lines, words, tmp_path):
    folder = instances(tmp_path / "star")
    (folder / "metadata.jsonl").write_text(lines)
    assert words.format(folder / "metadata.jsonl") in refusal(read, folder)


def test_columns_of_metadata(tmp_path):
    folder = instances(tmp_path / "star", 1)
    assert "--caption_column words is not used" in read(folder, column="words")[2]
    (folder / "metadata.csv").write_text("file_name,words\n0.png,a caption\n")
    assert "words" in read(folder)[2] and read(folder)[1] == [["p"]]
    assert read(folder, column="words")[1] == [["a caption"]]
    assert "choose a --caption_column of file_name, words" in refusal(read, folder, column="text")


def test_folders_of_kohya_are_read_with_their_repeats(tmp_path):
    instances(tmp_path / "10_sks star")
    instances(tmp_path / "2_a big star", 1)
    instances(tmp_path / "old", 1)
    pictures, captions, told = read(tmp_path, None, need_captions=True)
    assert len(pictures) == 32 and len({id(picture) for picture in pictures}) == 4
    assert captions == [["sks star"]] * 30 + [["a big star"]] * 2
    assert "10_sks star, each 10 times" in told and "1 folder" in told and "old" in told
    (tmp_path / "2_a big star" / "0.txt").write_text("of its own")
    _, captions, told = read(tmp_path, "p")
    assert captions == [["p"]] * 30 + [["of its own"]] * 2


def test_layouts_that_are_not_read_say_how_to_lay_out(tmp_path):
    instances(tmp_path / "a" / "star")
    assert "'10_sks dog'" in refusal(read, tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "star", tmp_path / "a" / "10_star")
    shutil.copy(STAR / "0.png", tmp_path / "a")
    assert "both itself and in '10_star'" in refusal(read, tmp_path / "a")
    instances(tmp_path / "b" / "0_star")
    assert "0 repeats" in refusal(read, tmp_path / "b")


# ---- Datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ([0, 1, 2], "Row 0 of the column 'text' of --dataset_name {0} is a number (0), not text"),
        ([["a"], ["b"], ["c"]], "is a list, not text"),
        ([{"a": 1}] * 3, "is a dict, not text"),
        (["", " ", ""], "Row 0 of the column 'text' of --dataset_name {0} is empty"),
    ],
)
def test_columns_that_are_no_captions_are_named_with_their_row(captions, words, tmp_path):
    folder = instances(tmp_path / "star")
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert words.format(folder) in refusal(read_rows, folder, tmp_path)


def test_empty_cells_have_the_prompt_or_are_refused(tmp_path):
    folder = instances(tmp_path / "star")
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(("a", "", None))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, captions, told = read_rows(folder, tmp_path)
    assert captions == [["a"], ["p"], ["p"]] and "2 rows" in told
    assert "Row 1 of the column 'text'" in refusal(read_rows, folder, tmp_path, None)
    message = refusal(read_rows, folder, tmp_path, None, column=None, need_captions=True)
    assert "choose a --caption_column of image, text" in message


def test_datasets_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.jsonl").write_text('{"image": "0.png", "text": "x"}')
    (tmp_path / "json" / "b.jsonl").write_text('{"picture": "0.png", "other": 1}')
    assert "different columns" in refusal(read_rows, tmp_path / "json", tmp_path)
    folder = instances(tmp_path / "bad")
    (folder / "1.png").write_bytes((STAR / "1.png").read_bytes()[:500])
    (folder / "2.png").write_bytes(png_header(20000, 10000))
    message = refusal(read_rows, folder, tmp_path, column=None)
    assert "row 1 of the column 'image' cannot be read (damaged" in message and "row 2" in message
    captioned = instances(tmp_path / "captioned")
    (captioned / "0.txt").write_text("a")
    assert "are for --instance_data_dir" in refusal(read_rows, captioned, tmp_path, column="caption")


@pytest.mark.parametrize("within", ["", "train"])
def test_repeats_that_a_dataset_would_ignore_are_refused(within, tmp_path):
    """The same folders are read by --instance_data_dir, which the sentence names."""
    folder = tmp_path / "data" / within
    instances(folder / "10_sks star")
    message = refusal(read_rows, tmp_path / "data", tmp_path, column=None)
    assert message == (
        f"--dataset_name {tmp_path / 'data'} would ignore the repeats of '10_sks star', which is a folder of kohya's "
        f"layout; use --instance_data_dir {folder} instead."
    )
    assert len(read(folder)[0]) == 30


def test_captions_that_a_dataset_would_ignore_are_refused(tmp_path):
    folder = instances(tmp_path / "data")
    (folder / "readme.txt").write_text("of no picture")
    assert read_rows(folder, tmp_path, column=None)[1] == [["p"]] * 3
    (folder / "1.caption").write_text("a caption")
    assert f"use --instance_data_dir {folder} instead" in refusal(read_rows, folder, tmp_path, column=None)


# ---- Sheets ----------------------------------------------------------------------------------------------------------


def test_a_sheet_shows_small_pictures_by_whole_factors(tmp_path):
    """Every pixel of a picture is a square of equal colour."""
    picture = Image.effect_noise((48, 48), 90).convert("RGB")
    sheet = comparison_grid({"tuned": [[picture]]}, ["a"], seed=5, step=7)
    factor = 6  # 288 pixels, at least 256
    large = picture.resize((48 * factor, 48 * factor), Image.Resampling.NEAREST)
    left, top = sheet.width - large.width - 2, sheet.height - large.height - 2
    assert sheet.crop((left, top, left + large.width, top + large.height)).tobytes() == large.tobytes()
    save_picture(sheet, tmp_path / "sheet.png")
    read_back = Image.open(tmp_path / "sheet.png")
    assert read_back.info["seed"] == "5" and read_back.info["step"] == "7"
    assert json.loads(read_back.info["prompts"]) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_sheet_has_whole_captions_seeds_and_step(monkeypatch):
    """As they are drawn: no word is left out, no line is wider than its column, even of one long word."""
    drawn = []
    pen = type(rooms.ImageDraw.Draw(Image.new("RGB", (1, 1))))
    for method in ("text", "multiline_text"):
        monkeypatch.setattr(pen, method, lambda self, xy, text, **options: drawn.append((xy, text, self, options)))
    prompts = [" ".join(f"word{number}" for number in range(60)), "x" * 90]
    picture = Image.new("RGB", (256, 256))
    sheet = comparison_grid({"base": [[picture] * 2] * 2, "tuned": [[picture] * 2] * 2}, prompts, seed=3, step=400)
    texts = [text for _, text, _, _ in drawn]
    assert [text.replace("\n", " ") for text in texts][1] == prompts[0] and texts[2].replace("\n", "") == prompts[1]
    assert texts[0] == "step 400" and texts[3:] == [
        f"{name}\nseed {seed}" for seed in (3, 4) for name in ("base", "tuned")
    ]
    for _, text, draw, options in drawn[1:3]:
        assert max(draw.textlength(line, font=options["font"]) for line in text.split("\n")) <= 256
        assert draw.multiline_textbbox((0, 0), text, font=options["font"])[3] < sheet.height - 4 * 260


def test_a_sheet_of_checkpoints_has_a_row_for_each_prompt():
    """As wide as its columns, and as high as its longest prompt where that is higher than the pictures."""
    shades = {"base": [10, 20], "checkpoint-2": [30, 40], "step 4, the result": [50, 60]}
    columns = {name: [Image.new("RGB", (256, 256), (red, 0, 0)) for red in reds] for name, reds in shades.items()}
    short, long = (checkpoint_grid(columns, ["a star", prompt], 7) for prompt in ("b", "many words " * 60))
    for sheet in (short, long):
        places = {}
        for red in sum(shades.values(), []):
            found = np.argwhere((np.asarray(sheet) == (red, 0, 0)).all(axis=-1))
            assert len(found) == 256 * 256
            places[red] = found[0].tolist()
        tops, lefts = ({red: places[red][axis] for red in places} for axis in (0, 1))
        assert tops[10] == tops[30] == tops[50] < tops[20] == tops[40] == tops[60]
        assert lefts[10] == lefts[20] < lefts[30] == lefts[40] < lefts[50] == lefts[60]
    assert long.height > short.height + 2 * 100 and json.loads(short.info["prompts"]) == ["a star", "b"]
