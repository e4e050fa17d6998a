"""Small benchmarks in files of exactly the published form."""

import io
import json

from PIL import Image

from tests.conftest import COLOURS

QUESTION_TYPES = ("what color is the", "is the", "how many")
ANSWER_TYPES = ("other", "yes/no", "number")


def colour_of(number):
    return COLOURS[number % len(COLOURS)]


def write_jpeg(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    # No two are the same picture.
    Image.new("RGB", (40 + number, 30), colour_of(number)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def captions_of(number):
    colour = colour_of(number)
    forms = ("a {} square", "A {} picture.", "There's a {} thing", "one {} area, flat", "it is {}")
    return [form.format(colour) for form in forms]


def write_coco_test(folder, count):
    """image_info_test2014.json and its pictures, without captions."""
    images = []
    for number in range(count):
        name = f"COCO_test2014_{number:012d}.jpg"
        write_jpeg(folder / "test2014" / name, number)
        images.append({"id": number, "file_name": name, "height": 30, "width": 40 + number})
    write_json(folder / "image_info_test2014.json", {"info": {}, "images": images})


def write_coco(folder, count, subset="val2017"):
    """captions_val2017.json and its pictures."""
    images, annotations = [], []
    for number in range(count):
        name = f"{1000 + number:012d}.jpg"
        write_jpeg(folder / subset / name, number)
        images.append(
            {"license": 4, "file_name": name, "coco_url": "", "id": 1000 + number}
            | {"height": 30, "width": 40 + number, "date_captured": "", "flickr_url": ""}
        )
        for text in captions_of(number):
            caption = {"image_id": 1000 + number, "id": 7 * len(annotations), "caption": text}
            annotations.append(caption)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    write_json(folder / "annotations" / f"captions_{subset}.json", content)


def write_karpathy(folder, name, count):
    """dataset_coco.json or dataset_flickr30k.json: every third picture is of the test split."""
    images = []
    for number in range(count):
        if name == "coco":
            place = {"filepath": "val2014", "filename": f"COCO_val2014_{number:012d}.jpg"}
            place["cocoid"] = number
            write_jpeg(folder / "val2014" / place["filename"], number)
        else:
            place = {"filename": f"{1000092795 + number}.jpg"}
            write_jpeg(folder / "flickr30k-images" / place["filename"], number)
        sentences = [
            {"tokens": t.lower().split(), "raw": t, "imgid": number, "sentid": 5 * number + n}
            for n, t in enumerate(captions_of(number))
        ]
        split = ("test", "train", "restval" if name == "coco" else "val")[number % 3]
        sentids = [s["sentid"] for s in sentences]
        images.append(
            {"sentids": sentids, "imgid": number, "sentences": sentences, "split": split} | place
        )
    write_json(folder / f"dataset_{name}.json", {"images": images, "dataset": name})


def write_vqa(folder, count, subset="val2014", prefix="v2_"):
    """Questions, annotations and pictures of VQAv2, or with no prefix of OK-VQA; two a picture."""
    questions, annotations = [], []
    for number in range(count):
        image = 42 + number // 2
        write_jpeg(folder / subset / f"COCO_{subset}_{image:012d}.jpg", number // 2)
        question = 10 * image + number % 2
        colour = colour_of(number // 2)
        words = f"What color is this, {number}?"
        questions.append({"image_id": image, "question": words, "question_id": question})
        answers = [colour] * 7 + [f"{colour}ish", "the Dark one.", "2"]
        annotations.append(
            {
                "question_type": QUESTION_TYPES[number % 3],
                "multiple_choice_answer": colour,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": n + 1}
                    for n, answer in enumerate(answers)
                ],
                "image_id": image,
                "answer_type": ANSWER_TYPES[number % 3],
                "question_id": question,
            }
        )
    common = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
    write_json(
        folder / f"{prefix}OpenEnded_mscoco_{subset}_questions.json",
        common | {"task_type": "Open-Ended", "questions": questions},
    )
    write_json(
        folder / f"{prefix}mscoco_{subset}_annotations.json", common | {"annotations": annotations}
    )


def write_vqa_test(folder, count, subset="test-dev2015"):
    """Questions of a part of VQAv2's test set, which have no annotations."""
    questions = []
    for number in range(count):
        write_jpeg(folder / "test2015" / f"COCO_test2015_{number:012d}.jpg", number)
        question = {"image_id": number, "question": "Why?", "question_id": 10 * number}
        questions.append(question)
    content = {"data_subtype": subset, "questions": questions}
    write_json(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", content)


def write_textvqa(folder, count, split="val"):
    data = []
    for number in range(count):
        image = f"{number:016x}"
        images = "test_images" if split == "test" else "train_images"
        write_jpeg(folder / images / f"{image}.jpg", number)
        colour = colour_of(number)
        data.append(
            {
                "question": "what is the brand?",
                "image_id": image,
                "image_classes": ["Phone"],
                "flickr_original_url": "",
                "image_width": 40 + number,
                "answers": [f"{colour}'s"] * 6 + [f"{colour},"] * 4,
                "question_tokens": ["what", "is", "the", "brand"],
                "question_id": 34602 + number,
                "set_name": split,
            }
        )
        if split == "test":
            del data[-1]["answers"]
    content = {"dataset_type": split, "dataset_name": "textvqa", "data": data}
    write_json(folder / f"TextVQA_0.5.1_{split}.json", content)


def write_imagenet(folder, classes, pictures):
    """Folders of classes, and Kaggle's list of their synonyms."""
    lines = []
    for number in range(classes):
        wnid = f"n0{1440764 + 10 * number}"
        lines.append(f"{wnid} {colour_of(number)} square, Squarus {number}\n")
        for n in range(pictures + number):
            write_jpeg(folder / "val" / wnid / f"ILSVRC2012_val_{n:08d}.JPEG", number)
    (folder / "LOC_synset_mapping.txt").write_text("".join(lines))


def write_flat_imagenet(folder, classes, pictures):
    """Kaggle's form: validation pictures in one folder, and a table of their classes and boxes."""
    lines = ["ImageId,PredictionString"]
    for number in range(classes * pictures):
        name = f"ILSVRC2012_val_{number + 1:08d}"
        write_jpeg(folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{name}.JPEG", number)
        wnid = f"n0{1440764 + 10 * (number % classes)}"
        lines.append(f"{name},{wnid} 1 2 30 40 {wnid} 5 6 7 8 ")
    lines[1:] = reversed(lines[1:])
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines))
    names = [f"n0{1440764 + 10 * n} {colour_of(n)} square, Squarus" for n in range(classes)]
    (folder / "LOC_synset_mapping.txt").write_text("\n".join(names))
