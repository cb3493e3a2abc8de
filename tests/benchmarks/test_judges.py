# SPDX-License-Identifier: MIT
"""Judges: the detector's recipe, tiny random models in its place, a chat endpoint, records that resume."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from chat_server import ChatServer
from PIL import Image

from janusflow_min import cli
from janusflow_min.benchmarks import chat, judge_models, judges
from janusflow_min.benchmarks.chat import ChatVQA, JudgeDown, OpenAIChat, Question, judge_all
from janusflow_min.benchmarks.detection import CLASSES, COLOURS
from janusflow_min.benchmarks.judges import NoAnswer, Records, TryAgain

# The detector's recipe -----------------------------------------------------------------------


def test_instances_follow_mmdets_recipe():
    """Stops: thresholds before upsampling, one class for each query, scores without the mask's certainty."""
    classes = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]))  # the last column is "nothing"
    masks = torch.full((2, 4, 4), -2.0)
    masks[0, :2, :2] = 2.0
    scores, labels, boxes, binary = judge_models.instances(classes, masks, (4, 4), (4, 4), (4, 4), best=3)
    certainty = float(torch.tensor(2.0).sigmoid())
    assert labels.tolist()[:2] == [0, 1]  # both of query 0
    assert scores[:2].tolist() == pytest.approx([0.6 * certainty, 0.3 * certainty], rel=1e-5)
    assert boxes[0].tolist() == [0, 0, 2, 2] and binary[0].sum() == 4
    assert scores[2] == 0 and boxes[2].tolist() == [0, 0, 0, 0]  # an empty mask


def test_masks_are_upsampled_as_logits_and_padding_is_cut():
    masks = torch.tensor([[[3.0, -1.0], [3.0, -1.0]]])
    _, _, boxes, binary = judge_models.instances(torch.zeros(1, 2), masks, (4, 8), (4, 4), (4, 4), best=1)
    # 2 -> 8 columns, then only the left four, whose logits fall from 3 to 1.5 or so: all inside.
    assert binary.all() and boxes[0].tolist() == [0, 0, 4, 4]
    _, _, boxes, _ = judge_models.instances(torch.zeros(1, 2), masks, (4, 8), (4, 8), (4, 8), best=1)
    assert boxes[0].tolist() == [
        0,
        0,
        5,
        4,
    ]  # the threshold 0 lies between columns, not between the two pixels


def test_images_are_prepared_as_mmdet_does():
    """Stops: padding after normalising, with a grey that the official detector was not shown."""
    square, size = judge_models.prepare_for_mmdet(Image.new("RGB", (384, 384), (124, 116, 104)), 800, 1333)
    assert square.shape == (1, 3, 800, 800) and size == (800, 800)
    assert square.abs().max() < 0.02
    wide, size = judge_models.prepare_for_mmdet(Image.new("RGB", (100, 50), "white"), 100, 150)
    assert size == (75, 150) and wide.shape == (1, 3, 96, 160)
    grey = [(128 - mean) / std for mean, std in ((123.675, 58.395), (116.28, 57.12), (103.53, 57.375))]
    for i, value in enumerate(grey):
        assert torch.allclose(wide[0, i, 75:], torch.tensor(value))
        assert torch.allclose(wide[0, i, :, 150:], torch.tensor(value))
    assert wide[0, 0, 0, 0] == pytest.approx((255 - 123.675) / 58.395, rel=1e-4)


def test_clip_is_shown_whole_multiples():
    """Stops: a crop of 5 x 45 px that becomes 2,015 px long instead of torchvision's 2,016, and so shifts by half."""
    image = Image.new("RGB", (5, 45), "black")
    image.paste("white", (0, 23, 5, 45))
    pixels = judge_models._clip_pixels(image, 224)
    longer = image.resize((224, 2016), Image.Resampling.BICUBIC).crop((0, 896, 224, 1120))
    expected = np.asarray(longer, np.float32)[..., 0] / 255
    assert np.allclose(pixels[0] * judge_models.CLIP_STD[0] + judge_models.CLIP_MEAN[0], expected, atol=1e-6)


# Tiny random models -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")  # Mask2Former needs it
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2
    )
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=80,
    )
    folder = tmp_path_factory.mktemp("detector")
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_a_tiny_random_detector(detector_folder):
    detector = judge_models.Mask2FormerDetector(detector_folder, "cpu", short=64, long=96)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    found = detector.detect(image)
    assert len(found) == 100  # of 5 queries x 80 classes
    for d in found:
        assert d.label in CLASSES and 0 <= d.score <= 1 and d.mask.shape == (40, 60) and d.mask.dtype == bool
        if d.mask.any():
            rows, columns = np.where(d.mask)
            assert d.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert len({d.label for d in found}) > 20
    assert detector.detect(image)[0].box == found[0].box
    assert "sha256" in detector.name and "64/96 px" in detector.name


def test_a_detector_of_other_classes_is_refused(detector_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Mask2FormerConfig.from_pretrained(detector_folder)
    config.num_labels = 3
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 3 classes"):
        judge_models.Mask2FormerDetector(tmp_path, "cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Letters are its tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz-"]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "ab", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = small | dict(vocab_size=len(tokens), eos_token_id=len(tokens) - 1, bos_token_id=len(tokens) - 2)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_a_tiny_random_clip_names_colours(clip_folder):
    """Against transformers' own features: three sentences, each normalised, their mean normalised again."""
    transformers = pytest.importorskip("transformers")
    clip = judge_models.ClipColours(clip_folder, "cpu")
    views = [Image.new("RGB", size, colour) for size, colour in (((20, 30), "red"), ((5, 5), "blue"))]
    answers = clip.colours(views, "cat")
    assert set(answers) <= set(COLOURS)
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)

    def features(out):
        return out if isinstance(out, torch.Tensor) else out.pooler_output

    with torch.no_grad():
        for i, colour in enumerate(COLOURS):
            embeddings = []
            for text in (
                f"a photo of a {colour} cat",
                f"a photo of a {colour}-colored cat",
                f"a photo of a {colour} object",
            ):
                one = features(model.get_text_features(**tokenizer(text, return_tensors="pt")))[0]
                embeddings.append(one / one.norm())
            mean = torch.stack(embeddings).mean(0)
            torch.testing.assert_close(clip.heads["cat"][i], mean / mean.norm(), rtol=1e-4, atol=1e-5)
        pixels = torch.stack([judge_models._clip_pixels(view, 16) for view in views])
        seen = features(model.get_image_features(pixel_values=pixels))
    assert [COLOURS[i] for i in (seen @ clip.heads["cat"].T).argmax(-1).tolist()] == answers


def test_clip_pixels_keep_the_shape_and_the_middle():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    pixels = judge_models._clip_pixels(image, 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels[:, 5, 5].tolist() == pytest.approx(
        [(1 - m) / s for m, s in zip(judge_models.CLIP_MEAN, judge_models.CLIP_STD, strict=True)]
    )


def test_a_tiny_random_blip_answers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        "[ENC]",
        "is",
        "there",
        "a",
        "kettle",
        "?",
        "yes",
        "no",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = small | dict(
        vocab_size=len(tokens), encoder_hidden_size=16, bos_token_id=5, eos_token_id=3, sep_token_id=3
    )
    config = transformers.BlipConfig(
        text_config=text | {"pad_token_id": 0}, vision_config=small | {"image_size": 16, "patch_size": 8}
    )
    transformers.BlipForQuestionAnswering(config).save_pretrained(tmp_path)
    vqa = judge_models.BlipVQA(tmp_path, "cpu")
    answer = vqa.answer(Image.new("RGB", (20, 30)), "is there a kettle?")
    assert isinstance(answer, str) and answer == vqa.answer(Image.new("RGB", (20, 30)), "is there a kettle?")


# Chat -----------------------------------------------------------------------


def test_what_may_pass_is_told_from_what_will_not():
    pytest.importorskip("openai")
    replies = [("hang", 3.0), ("drop", 0), ("status", 429), ("status", 502), ("raw", b"{"), ("raw", b"{}")]
    with ChatServer(lambda _, before: replies[before] if before < len(replies) else "yes") as server:
        chat = OpenAIChat("m", server.url, timeout=1.5, extra={"top_k": 1})
        for reply in replies:
            with pytest.raises(TryAgain):
                chat.ask([{"role": "user", "content": "?"}])
            assert reply is not None
        assert chat.ask([{"role": "user", "content": "?"}]) == "yes"
        assert len(server.requests) == len(replies) + 1  # the client itself does not retry
        assert server.requests[-1]["top_k"] == 1
    with ChatServer(lambda *_: ("status", 404)) as server, pytest.raises(RuntimeError, match="HTTP 404"):
        OpenAIChat("m", server.url).ask([{"role": "user", "content": "?"}])
    with pytest.raises(TryAgain):  # nobody listens there any more
        OpenAIChat("m", server.url, timeout=0.3).ask([{"role": "user", "content": "?"}])


def test_a_chat_answers_visual_questions():
    pytest.importorskip("openai")
    with ChatServer(lambda _, before: ("drop", 0) if before == 0 else "<think>hm</think> Yes.") as server:
        vqa = ChatVQA(OpenAIChat("m", server.url), wait=0.01)
        assert vqa.answer(Image.new("RGB", (2, 2)), "Is there a kettle?") == "Yes."
        assert server.requests[0]["messages"][0]["content"][0]["text"].endswith(
            "Question: Is there a kettle?"
        )


class Scripted:
    name = "scripted"

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def ask(self, messages):
        self.asked.append(messages[0])
        answer = self.answers.get(messages[0], "1")
        if isinstance(answer, BaseException):
            raise answer
        return answer


def number(text):
    return {"value": int(text)} if text.isdecimal() else None


def questions(*keys):
    return [Question(key, f"hash {key}", lambda key=key: [key]) for key in keys]


def test_answers_are_kept_as_they_come_and_not_asked_again(tmp_path):
    """Stops: an hour of judging lost to an interruption."""
    path, identity = tmp_path / "judge.jsonl", {"judge": "scripted"}
    chat = Scripted({"b": TryAgain("busy"), "c": "nonsense", "d": KeyboardInterrupt()})
    records = Records(path, "key", identity)
    failures = judge_all(
        chat, questions("a", "b", "c"), number, records, attempts=2, wait=0.0, progress=False
    )
    assert set(failures) == {"b", "c"} and failures["b"] == "busy" and "makes no sense" in failures["c"]
    assert sorted(chat.asked) == ["a", "b", "b", "c", "c"]
    with pytest.raises(KeyboardInterrupt):
        judge_all(chat, questions("d"), number, records, progress=False)
    records.close()
    with open(path, "a") as f:
        f.write('{"key": "e", "sha')  # an interruption in the middle of a line
    chat = Scripted({})
    records = Records(path, "key", identity)
    changed = [Question("a", "another image", lambda: ["a"])]
    assert not judge_all(chat, questions("a", "b"), number, records, progress=False)
    assert chat.asked == ["b"]
    assert not judge_all(chat, changed, number, records, progress=False)
    assert chat.asked == ["b", "a"]
    records.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a", "b", "a"]
    assert lines[-1] == {
        "key": "a",
        "sha256": "another image",
        "judge": "scripted",
        "answer": "1",
        "value": 1,
    }
    with pytest.raises(ValueError, match=r"judge\.jsonl:1 is of another judge"):
        Records(path, "key", {"judge": "another"})
    path.write_text("[]\n")
    with pytest.raises(ValueError, match=r"judge\.jsonl:1: not a judge's record"):
        Records(path, "key", identity)


def test_an_error_that_no_repetition_cures_is_raised_at_once(tmp_path):
    chat = Scripted({str(i): RuntimeError("wrong key") for i in range(100)})
    records = Records(tmp_path / "judge.jsonl", "key", {})
    with pytest.raises(RuntimeError, match="wrong key"):
        judge_all(chat, questions(*map(str, range(100))), number, records, concurrency=2, progress=False)
    assert len(chat.asked) < 50
    with pytest.raises(ValueError, match="at least 1, got 0"):
        judge_all(chat, [], number, records, concurrency=0)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>{1}</think>{2}", "{2}"),
        ("well {1}</think>\n{2}", "{2}"),
        ("{2}", "{2}"),
        ("{1}<think>hm</think>{2}", "{1}{2}"),
        ("<think>If it were there, Score: 1 would be right, but I see", ""),
        ("{1} <THINK>cut off {2}", "{1}"),
        ("<think>a<think>b</think>{1}</think>{2}", "{2}"),
        ("<thinking>{1}</thinking>{2}", "{2}"),
    ],
)
def test_thinking_is_no_answer(text, rest):
    """Stops: a grade out of the middle of a judge's reasoning, above all of one that was cut off."""
    assert judges.strip_thinking(text) == rest


# Judges that fail -----------------------------------------------------------------------


def test_one_refused_item_costs_one_item(tmp_path):
    """Stops: a content filter that blocks the scoring of all other items for ever."""
    pytest.importorskip("openai")
    for status in (400, 413, 422):
        with ChatServer(
            lambda body, _, status=status: ("status", status) if body["messages"] == [7] else "1"
        ) as server:
            records = Records(tmp_path / f"{status}.jsonl", "key", {})
            failures = judge_all(
                OpenAIChat("m", server.url), questions(*range(20)), number, records, progress=False
            )
            records.close()
        assert list(failures) == [7] and f"HTTP {status}" in failures[7]
        assert sorted(records.entries) == [key for key in range(20) if key != 7]
        assert sum(request["messages"] == [7] for request in server.requests) == 1  # asking again is useless


def test_what_fails_for_all_ends_the_run_and_keeps_what_comes(tmp_path):
    """Stops: a wrong key that is tried a thousand times, and answers under way that are thrown away with it."""
    pytest.importorskip("openai")
    for status in (401, 403, 404):
        with ChatServer(
            lambda body, _, status=status: ("status", status) if body["messages"] == [1] else ("hang", 0.4)
        ) as server:
            records = Records(tmp_path / f"{status}.jsonl", "key", {})
            with pytest.raises(RuntimeError, match=f"HTTP {status}"):
                judge_all(
                    OpenAIChat("m", server.url),
                    questions(*range(50)),
                    lambda text: {"text": text},
                    records,
                    concurrency=2,
                    progress=False,
                )
            records.close()
        assert 0 in records.entries and len(server.requests) < 6


def test_a_dead_judge_ends_the_run_soon(tmp_path):
    """Stops: exit code 0 after hours of attempts, with nothing scored."""
    chat = Scripted({str(i): TryAgain("connection refused") for i in range(1000)})
    records = Records(tmp_path / "judge.jsonl", "key", {})
    with pytest.raises(JudgeDown, match=r"5 items in a row got no answer from scripted.*connection refused"):
        judge_all(chat, questions(*map(str, range(1000))), number, records, 2, 2, False, 0.0, stop_after=5)
    assert len(chat.asked) <= 14
    chat = Scripted({str(i): TryAgain("busy") for i in range(0, 1000, 2)})  # every other item is answered
    failures = judge_all(
        chat, questions(*map(str, range(1000))), number, records, 1, 1, False, 0.0, stop_after=2
    )
    assert len(failures) == 500
    records.close()


def test_a_judge_that_never_answers_is_down_however_few_ask(tmp_path):
    """Stops: exit code 0 where the last three items, fewer than the limit, all met a dead server; and the opposite, a
    run that can never end for the one item that the judge refuses, or always answers with nonsense."""
    records = Records(tmp_path / "judge.jsonl", "key", {})

    def ask(*replies) -> dict:
        chat = Scripted({str(i): reply for i, reply in enumerate(replies)})
        return judge_all(chat, questions(*chat.answers), number, records, 2, 2, False, 0.0)

    for replies in ([TryAgain("connection refused")], [TryAgain("HTTP 500")] * 3):
        with pytest.raises(JudgeDown, match=r"no answer at all from scripted.*(refused|500)"):
            ask(*replies)
    assert len(ask(NoAnswer("a content filter"))) == 1
    assert len(ask("what?", "who?")) == 2
    assert len(ask(TryAgain("no text within 20 tokens", answered=True))) == 1
    assert len(ask(TryAgain("busy"), "1")) == 1
    assert ask() == {}
    records.close()
    vqa = ChatVQA(Scripted({}), attempts=1, wait=0.0)
    vqa.asking.chat.ask = lambda messages: (_ for _ in ()).throw(TryAgain("connection refused"))
    with pytest.raises(NoAnswer):
        vqa.answer(Image.new("RGB", (2, 2)), "?")
    with pytest.raises(JudgeDown, match="connection refused"):
        vqa.asking.check_answered()


@pytest.mark.parametrize("text", ["1 \ud800", "\udfff\n1", "1 \x00\u2028\x85", "1 \U0001f600 é"])
def test_odd_characters_of_an_answer_are_kept(tmp_path, text):
    """Stops: one answer with half a character that ends a run of hours, and again at every resume."""
    records = Records(tmp_path / "judge.jsonl", "key", {})
    assert judge_all(Scripted({"a": text}), questions("a"), lambda _: {}, records, progress=False) == {}
    records.close()
    again = Records(tmp_path / "judge.jsonl", "key", {})
    assert again.entries["a"]["answer"] == text and not again.todo(questions("a"))
    again.close()


def test_no_reply_of_a_server_ends_the_run(tmp_path):
    """Stops: a body of brackets or of nonsense that is an internal error instead of one more attempt."""
    pytest.importorskip("openai")
    bodies = [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"choices": [{}]}',
    ]
    for number_of, body in enumerate(bodies):
        with ChatServer(
            lambda request, _, body=body: ("raw", body) if request["messages"] == [1] else "1"
        ) as server:
            records = Records(tmp_path / f"{number_of}.jsonl", "key", {})
            failures = judge_all(
                OpenAIChat("m", server.url), questions(0, 1, 2), number, records, attempts=1, progress=False
            )
            records.close()
        assert list(failures) == [1], body[:20]


def test_a_dead_judge_has_an_exit_code(tmp_path, monkeypatch, capsys):
    """Stops: a shell script that goes on to `report` although no judge was there."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    images.mkdir()
    record = {"Prompt": "a", "Explanation": "b", "Category": "c", "Subcategory": "d"}
    content = json.dumps([record | {"prompt_id": i} for i in range(1, 15)])
    (data / "cultural_common_sense.json").write_text(content)
    for i in range(1, 15):
        Image.new("RGB", (2, 2)).save(images / f"{i}.png")
    line = ["bench", "wise", "score", "--data", str(data), "--subset", "--images", str(images), "--quiet"]
    line += ["--out", str(tmp_path / "run"), "--judge-url", "http://127.0.0.1:9/v1", "--attempts", "1"]
    assert cli.main(line) == 2
    assert "10 items in a row got no answer" in capsys.readouterr().err


def test_a_server_says_how_long_to_wait(tmp_path):
    """Stops: three attempts within a rate limit's minute, all in vain."""
    pytest.importorskip("openai")
    from email.utils import formatdate

    assert chat._retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(
        30, abs=2
    )
    for text, seconds in (("2", 2.0), ("-1", 0.0), ("1e9", chat.LONGEST_WAIT), ("nan", 0.0), ("soon", 0.0)):
        assert chat._retry_after({"retry-after": text}) == seconds
    assert chat._retry_after({}) == 0.0
    times = []

    def reply(body, before):
        times.append(time.monotonic())
        return ("busy", "1") if before == 0 else "1"

    with ChatServer(reply) as server:
        records = Records(tmp_path / "judge.jsonl", "key", {})
        assert not judge_all(
            OpenAIChat("m", server.url), questions(1), number, records, wait=0.0, progress=False
        )
        records.close()
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize("reply", ["", "I cannot see the image.", "<think>Yes, there is", "Maybe", "nothing"])
def test_neither_yes_nor_no_is_no_answer(reply):
    """Stops: a silent no, kept for ever, for an image that the judge was not shown."""
    asked = Scripted({})
    asked.ask = lambda messages: asked.asked.append(messages) or reply
    vqa = ChatVQA(asked, attempts=2, wait=0.0)
    with pytest.raises(NoAnswer):
        vqa.answer(Image.new("RGB", (2, 2)), "Is there a kettle?")
    assert len(asked.asked) == 2
    with pytest.raises(JudgeDown):  # and all that are asked afterwards, whichever thread asks
        for _ in range(9):
            with pytest.raises(NoAnswer):
                vqa.answer(Image.new("RGB", (2, 2)), "Is there a kettle?")
    with pytest.raises(JudgeDown):
        vqa.answer(Image.new("RGB", (2, 2)), "Is there a kettle?")
    vqa = ChatVQA(asked, attempts=2, wait=0.0)
    for reply in ("yes", "No.", "**Yes**, there is", "<think>no</think> YES"):
        assert vqa.answer(Image.new("RGB", (2, 2)), "?") == judges.strip_thinking(reply)


def test_how_a_judge_is_asked_is_in_its_settings():
    """Stops: scores of two token limits under one judge's name; and a limit that cuts every answer, unexplained."""
    pytest.importorskip("openai")
    cut = {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "length"}
    body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [cut]})
    with ChatServer(lambda *_: ("raw", body.encode())) as server:
        judge = OpenAIChat("m", server.url, max_tokens=20, thinking=False, extra={"top_k": 1})
        with pytest.raises(TryAgain, match="no text within 20 tokens"):
            judge.ask([{"role": "user", "content": "?"}])
        extra = {"top_k": 1, "chat_template_kwargs": {"enable_thinking": False}}
        assert extra.items() <= server.requests[0].items()
    assert chat.judge_settings(judge) == {"temperature": 0.0, "max_tokens": 20, "extra": extra}
    assert chat.judge_settings(ChatVQA(judge)) == chat.judge_settings(judge)
