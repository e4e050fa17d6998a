"""Readers of published files: what they find, and what they say of files that are wrong."""

import json
import os

import pytest
import torch

from megavlm.data.image import read_square
from megavlm.errors import BadSampleError, DataError
from megavlm.eval.benchmarks import commonest, read_benchmark, read_picture
from megavlm.eval.imagenet import CLASSES, TEMPLATES
from tests.eval import published


def test_coco_captions(tmp_path):
    published.write_coco(tmp_path, 3)
    found = read_benchmark("coco_captions", tmp_path)
    assert found.task == "captions" and not found.left_out
    assert [item.key for item in found.items] == ["1000", "1001", "1002"]
    assert [list(item.truths) for item in found.items] == [
        published.captions_of(n) for n in (0, 1, 2)
    ]
    assert found.items[1].picture == tmp_path / "val2017" / "000000001001.jpg"
    encoded = found.items[1].picture.read_bytes()
    assert torch.equal(read_picture(found.items[1], 16), read_square(encoded, "", 16))
    # Examples are of the training split.
    published.write_coco(tmp_path, 2, subset="train2017")
    examples = read_benchmark("coco_captions", tmp_path, "examples")
    assert {item.picture.parent.name for item in examples.items} == {"train2017"}


def test_karpathys_splits(tmp_path):
    for name, benchmark in (("coco", "coco_captions"), ("flickr30k", "flickr30k")):
        published.write_karpathy(tmp_path, name, 7)
        found = read_benchmark(benchmark, tmp_path).items
        assert [list(item.truths) for item in found] == [
            published.captions_of(n) for n in (0, 3, 6)
        ]
        examples = read_benchmark(benchmark, tmp_path, "examples").items
        # COCO's training split is train with restval; Flickr30k's validation is not of it.
        assert len(examples) == (4 if name == "coco" else 2)
    assert found[1].key == "1000092798" and found[1].picture.parent.name == "flickr30k-images"


@pytest.mark.parametrize(("name", "prefix"), [("vqav2", "v2_"), ("okvqa", "")])
def test_questions_with_ten_answers(tmp_path, name, prefix):
    published.write_vqa(tmp_path, 3, prefix=prefix)
    first, second, third = read_benchmark(name, tmp_path).items
    assert (first.key, second.key, third.key) == ("420", "421", "430")
    assert first.picture == second.picture != third.picture
    assert first.picture == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert second.question == "What color is this, 1?" and second.kind == "yes/no"
    assert third.truths == ("green",) * 7 + ("greenish", "the Dark one.", "2")
    assert commonest(third.truths) == "green"


def test_textvqa(tmp_path):
    published.write_textvqa(tmp_path, 2)
    _, second = read_benchmark("textvqa", tmp_path).items
    assert second.key == "34603" and second.truths == ("green's",) * 6 + ("green,",) * 4
    assert second.picture == tmp_path / "train_images" / "0000000000000001.jpg"


def test_imagenet_with_names_of_its_own(tmp_path):
    published.write_imagenet(tmp_path, 3, 2)
    found = read_benchmark("imagenet", tmp_path)
    assert found.classes == ("red square", "green square", "blue square")
    assert found.templates == TEMPLATES
    assert [item.truths for item in found.items] == [("0",)] * 2 + [("1",)] * 3 + [("2",)] * 4
    assert found.items[0].key == "n01440764/ILSVRC2012_val_00000000"
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\nthe {}\n")
    (tmp_path / "classnames.txt").write_text("n01440764 ruby, bright\nn01440784 the sea\n")
    with pytest.raises(DataError, match=r"1 entry cannot be used: n01440774 has no class name"):
        read_benchmark("imagenet", tmp_path)
    found = read_benchmark("imagenet", tmp_path, skip_bad=True)
    assert found.templates == ("a photo of a {}.", "the {}")
    assert found.classes == ("ruby, bright", "the sea")
    assert [item.truths for item in found.items] == [("0",)] * 2 + [("1",)] * 4
    assert found.left_out == ("n01440774 has no class name",)


def test_imagenets_1000_classes_have_clips_names(tmp_path):
    assert len(CLASSES) == 1000 and len(TEMPLATES) == 80
    assert (CLASSES[0], CLASSES[517], CLASSES[999]) == (
        "tench",
        "construction crane",
        "toilet paper",
    )
    assert TEMPLATES[0] == "a bad photo of a {}." and TEMPLATES[-1] == "a tattoo of the {}."
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    for number in range(999):
        (tmp_path / f"n{number:08d}").mkdir()
    published.write_jpeg(tmp_path / "n00000517" / "x.JPEG", 0)
    with pytest.raises(DataError, match=r"999 classes, not ImageNet's 1,000.*classnames\.txt"):
        read_benchmark("imagenet", tmp_path)
    (tmp_path / "n99999999").mkdir()
    found = read_benchmark("imagenet", tmp_path)
    assert found.classes == CLASSES and found.items[0].truths == ("517",)
    # Kaggle's names are for subsets, whose measure is no published one; a user's own always win.
    lines = [f"n{number:08d} kaggle{number}, synonym" for number in [*range(999), 99999999]]
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    assert read_benchmark("imagenet", tmp_path).classes == CLASSES
    (tmp_path / "classnames.txt").write_text("\n".join(lines))
    assert read_benchmark("imagenet", tmp_path).classes[517] == "kaggle517, synonym"


def test_imagenet_of_kaggle_in_one_folder(tmp_path):
    published.write_flat_imagenet(tmp_path, 3, 2)
    found = read_benchmark("imagenet", tmp_path)
    assert found.classes == ("red square", "green square", "blue square")
    truths = {item.key[-1]: item.truths for item in found.items}
    assert truths == {str(n + 1): (str(n % 3),) for n in range(6)}
    pictures = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    assert {item.picture.parent for item in found.items} == {pictures}
    (pictures / "ILSVRC2012_val_00000002.JPEG").rename(pictures / "other.JPEG")
    found = read_benchmark("imagenet", tmp_path, skip_bad=True)
    assert len(found.items) == 5
    assert [bad.partition(" ")[2].partition(str(tmp_path))[0] for bad in found.left_out] == [
        "is not in ",
        "has no picture ",
    ]
    solution = tmp_path / "LOC_val_solution.csv"
    solution.write_text(solution.read_text() + "\nx,dog\n")
    with pytest.raises(DataError, match=r"LOC_val_solution\.csv: each line after the first must"):
        read_benchmark("imagenet", tmp_path)


def test_what_else_lies_among_imagenets_folders(tmp_path):
    published.write_imagenet(tmp_path, 2, 1)
    (tmp_path / "val" / "n01440764" / ".DS_Store").write_bytes(b"")
    assert len(read_benchmark("imagenet", tmp_path).items) == 3
    (tmp_path / "val" / "n99999999").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 entry cannot be used: .*n99999999 is a file, not"):
        read_benchmark("imagenet", tmp_path)


def test_a_name_that_is_not_utf8_is_a_bad_entry(tmp_path):
    published.write_imagenet(tmp_path, 2, 1)
    inner = os.fsencode(tmp_path / "val" / "n01440764")
    os.rename(inner + b"/ILSVRC2012_val_00000000.JPEG", inner + b"/caf\xe9.JPEG")
    with pytest.raises(DataError, match=r"caf\\udce9 has a picture whose name is not UTF-8"):
        read_benchmark("imagenet", tmp_path)
    found = read_benchmark("imagenet", tmp_path, skip_bad=True)
    assert len(found.items) == 2 and len(found.left_out) == 1


def change(path, **changed):
    write = json.loads(path.read_text())
    path.write_text(json.dumps(write | changed))


def test_what_cannot_be_used_is_named_or_left_out(tmp_path):
    published.write_coco(tmp_path, 4)
    path = tmp_path / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    change(
        path,
        annotations=[
            *(a for a in content["annotations"] if a["image_id"] != 1002),
            {"image_id": 7, "id": 99, "caption": "of nothing"},
        ],
    )
    (tmp_path / "val2017" / "000000001001.jpg").unlink()
    with pytest.raises(DataError) as error:
        read_benchmark("coco_captions", tmp_path)
    told = str(error.value)
    assert "3 entries cannot be used" in told and "--skip-bad" in told
    assert "caption 99 is of image 7, which is not listed" in told
    assert f"1001 has no picture {tmp_path}/val2017/000000001001.jpg" in told
    assert "1002 has no truth" in told
    found = read_benchmark("coco_captions", tmp_path, skip_bad=True)
    assert [item.key for item in found.items] == ["1000", "1003"] and len(found.left_out) == 3


def test_questions_and_annotations_must_fit(tmp_path):
    published.write_vqa(tmp_path, 6)
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    asked = json.loads(questions.read_text())["questions"]
    asked[2]["image_id"] = 42
    change(questions, questions=[*asked[1:], {"image_id": 42, "question": "?", "question_id": 5}])
    found = read_benchmark("vqav2", tmp_path, skip_bad=True)
    assert len(found.items) == 4
    assert found.left_out == (
        "question 430 and its annotation name different images",
        "question 5 has no annotation",
        "annotation of question 420, which is not asked",
    )
    annotations.unlink()
    with pytest.raises(DataError, match=r"holds no v2_mscoco_val2014_annotations\.json; download"):
        read_benchmark("vqav2", tmp_path)


def test_ids_that_are_there_twice_are_bad_entries(tmp_path):
    published.write_vqa(tmp_path / "vqa", 4)
    for name in ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations"):
        path = tmp_path / "vqa" / f"v2_{name}.json"
        kind = name.rpartition("_")[2]
        entries = json.loads(path.read_text())[kind]
        change(path, **{kind: [*entries, entries[1] | {"question": "other", "answers": []}]})
    with pytest.raises(DataError, match=r"annotation 421 is there twice, of which the first co"):
        read_benchmark("vqav2", tmp_path / "vqa")
    found = read_benchmark("vqav2", tmp_path / "vqa", skip_bad=True)
    assert len(found.left_out) == 2 and "question 421 is there twice" in found.left_out[1]
    assert found.items[1].question != "other" and len(found.items[1].truths) == 10
    published.write_coco(tmp_path, 3)
    path = tmp_path / "annotations" / "captions_val2017.json"
    images = json.loads(path.read_text())["images"]
    change(path, images=[*images, images[1] | {"id": 1000}])
    published.write_textvqa(tmp_path, 3)
    path = tmp_path / "TextVQA_0.5.1_val.json"
    data = json.loads(path.read_text())["data"]
    change(path, data=[*data, data[0]])
    for name, told in (("coco_captions", "image 1000"), ("textvqa", "34602")):
        found = read_benchmark(name, tmp_path, skip_bad=True)
        assert found.left_out == (f"{told} is there twice, of which the first counts",)
        assert len(found.items) == 3
        assert found.items[0].picture.name in ("000000001000.jpg", "0000000000000000.jpg")


def test_what_has_no_published_truths(tmp_path):
    published.write_vqa_test(tmp_path, 2)
    published.write_vqa_test(tmp_path, 3, "test2015")
    published.write_textvqa(tmp_path, 2, "test")
    published.write_coco_test(tmp_path, 2)
    published.write_vqa(tmp_path, 4, subset="train2014")
    published.write_textvqa(tmp_path, 3, "train")
    published.write_coco(tmp_path, 3, "train2014")
    for name, items, folder, examples in (
        ("vqav2_test_dev", 2, "test2015", 4),
        ("vqav2_test", 3, "test2015", 4),
        ("textvqa_test", 2, "test_images", 3),
        ("coco_captions_test", 2, "test2014", 3),
    ):
        found = read_benchmark(name, tmp_path)
        assert found.name == name and not found.has_truths and len(found.items) == items
        assert {item.truths for item in found.items} == {()}
        assert {item.picture.parent.name for item in found.items} == {folder}
        shown = read_benchmark(name, tmp_path, "examples")
        assert shown.has_truths and len(shown.items) == examples


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"data": [{}]}',
        '{"data": 5}',
        '{"data": [{"question_id": 1, "image_id": "../x"}]}',
        '{"data": [{"question_id": 1, "image_id": "x", "question": 5, "answers": []}]}',
    ],
)
def test_files_of_another_form_are_one_clear_error(tmp_path, content):
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(content)
    with pytest.raises(DataError, match=r"TextVQA_0\.5\.1_val\.json is not of the published form"):
        read_benchmark("textvqa", tmp_path)


def test_mistakes_in_names_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"no benchmark coco; choose from coco_captions, flickr30k"):
        read_benchmark("coco", tmp_path)
    with pytest.raises(DataError, match=r"vqav2=.*nowhere is not a folder"):
        read_benchmark("vqav2", tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"holds no dataset_coco\.json and no captions_val2017\.json"
    ):
        read_benchmark("coco_captions", tmp_path)
    with pytest.raises(DataError, match=r"holds no folders of classes"):
        read_benchmark("imagenet", tmp_path)
    published.write_textvqa(tmp_path, 1)
    [item] = read_benchmark("textvqa", tmp_path).items
    item.picture.write_bytes(b"no picture")
    with pytest.raises(BadSampleError, match=r"0000000000000000\.jpg cannot be used"):
        read_picture(item, 16)
    item.picture.unlink()
    with pytest.raises(BadSampleError, match=r"cannot read .*0000000000000000\.jpg"):
        read_picture(item, 16)
