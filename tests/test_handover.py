"""Promises of handing over: a run or an adapter that lies elsewhere works with what it needs and no more, by content
and not by path; what is packed is whole, tells nothing of the machine, and is checked before anything of it appears."""

import gzip
import io
import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import CHATML, rows_of, write_rows
from eval_runs import Remembers, edit_json, make_run

from lorakit.run_dir import Run
from lorakit.share.archive import index_text


@pytest.fixture(scope="module")
def packs(tmp_path_factory, tiny_base):
    """A run, scored, packed in several ways; then its folder, its rows and its base are gone from where they were."""
    from lorakit.progress import Silent
    from lorakit.share.contents import PackOptions
    from lorakit.share.pack import pack

    root = tmp_path_factory.mktemp("packs")
    base = shutil.copytree(tiny_base, root / "there" / "base")
    (root / "there" / "own.jinja").write_text(CHATML, encoding="utf-8")
    run = make_run(root / "there", base, model={"chat_template": "own.jinja"})
    other = {"given": "/srv/models/other", "base": "/srv/models/base"}
    facts = {"format": 2, "rows": {"source": "/srv/rows.jsonl"}, "models": {"other": other}}
    run.evaluations.mkdir(exist_ok=True)
    (run.evaluations / "20200101T000000.json").write_text(json.dumps(facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(root / "cache"))
        patch.setenv("COLUMNS", "1000")
        patch.setattr(sys, "argv", ["lorakit", "eval", str(run.folder), "--quiet", "--diagnose"])
        from lorakit.cli import main

        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    for name, options in {
        "plain.tar": PackOptions(),
        "again.tar": PackOptions(),
        "rows.tar.zst": PackOptions(held_out_rows=True),
        "all.tar.gz": PackOptions(held_out_rows=True, training_rows=True),
    }.items():
        pack(run, root / name, options, Silent())
    shutil.move(base, root / "base")
    shutil.move(root / "there", root / "gone")
    return root


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another home, cache and working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def scores_of(run):
    file = max(run.evaluations.glob("*.json"))
    models = json.loads(file.read_text())["models"]
    return {name: model["scores"] for name, model in models.items()}


def notes(err):
    """What was to be looked at, but for what scores tell of a model."""
    return [line for line in err.splitlines() if re.match(r"note: (?!\w+: (the|\d+% of the) answers )", line)]


def members(file):
    with tarfile.open(file) as archive:
        return [(info, archive.extractfile(info).read()) for info in archive]


def test_a_run_that_was_unpacked_elsewhere_works_without_its_machine(packs, elsewhere, command, monkeypatch):
    code, out, err = command("unpack", packs / "rows.tar.zst", "-o", "mine")
    assert code == 0 and "next: lorakit eval mine (--base MODEL" in out, err
    run, base = Run(elsewhere / "mine"), packs / "base"
    before = scores_of(run)
    scores = max(run.evaluations.glob("*.json"))
    shutil.move(scores, elsewhere / "old.json")
    code, _, err = command("eval", "mine", "--base", base)
    assert code == 0 and not notes(err), err
    assert "rows of the training, which cannot be read" in err
    assert scores_of(run) == before
    code, out, err = command("merge", "mine", "--base", base)
    assert code == 0 and "10 held-out rows" in out and not notes(err), err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me about lamps.\n"))
    code, out, err = command("chat", "mine", "--base", base, "--max-new-tokens", "4", "--json")
    assert code == 0 and not notes(err) and json.loads(out)["answers"], err
    code, _, err = command("export", "mine", "--to", "vllm", "--base", base)
    assert code == 0 and not notes(err), err
    code, out, err = command("export", "mine", "--to", "huggingface", "--base", base)
    assert code == 0, err
    assert not (elsewhere / "train.jsonl").exists()


def test_packing_gives_the_same_bytes_again_and_after_unpacking(packs, elsewhere, command):
    assert (packs / "plain.tar").read_bytes() == (packs / "again.tar").read_bytes()
    for name, flags in {"plain.tar": (), "rows.tar.zst": ("--held-out-rows",)}.items():
        folder = elsewhere / name / "run"
        assert command("unpack", packs / name, "-o", folder)[0] == 0
        code, _, err = command("pack", folder, "-o", elsewhere / f"2{name}", *flags)
        assert code == 0, err
        assert (elsewhere / f"2{name}").read_bytes() == (packs / name).read_bytes()
    (info, _), *_ = members(packs / "plain.tar")
    assert (info.mtime, info.uid, info.uname, info.mode) == (0, 0, "", 0o644)


def test_no_rows_are_packed_unless_asked_and_no_path_of_the_machine(packs, elsewhere, command):
    texts = {}
    for name in ("plain.tar", "rows.tar.zst", "all.tar.gz"):
        code, out, err = command("unpack", packs / name, "-o", elsewhere / name, "--json")
        assert code == 0, err
        files = json.loads(out)["files"]
        assert {"recipe.yaml", "manifest.json", "log.jsonl", "adapter/adapter_model.safetensors"} <= files.keys()
        assert not any(name.startswith(("checkpoints", "merged", "export")) for name in files)
        texts[name] = b"".join((elsewhere / name / file).read_bytes() for file in files).decode("utf-8", "replace")
        assert str(packs) not in texts[name] and "/srv" not in texts[name]
    (held_out,) = {row["messages"][0]["content"] for row in rows_of(40)[33:34]}
    (trained,) = {row["messages"][0]["content"] for row in rows_of(22)[13:14]}
    assert [held_out in texts[name] for name in texts] == [False, True, True]
    assert [trained in texts[name] for name in texts] == [False, False, True]
    folder = elsewhere / "all.tar.gz"
    assert (folder / "rows/train/0/train.jsonl").is_file() and (folder / "rows/eval/0/eval.jsonl").is_file()


def test_held_out_rows_that_are_a_share_of_a_file_are_packed_alone(tmp_path, tiny_base, elsewhere, command):
    base = shutil.copytree(tiny_base, tmp_path / "there" / "base")
    adapter, cleaning = {"kind": "none", "rank": ..., "alpha": ...}, {"duplicates": "fix", "near_leakage": "off"}
    data = {"eval": 0.3, "clean": cleaning}
    run = make_run(tmp_path / "there", base, adapter=adapter, data=data, train={"learning_rate": 0.01, "steps": 2})
    expected = run.read_manifest()["data"]["tokens_sha256"]["eval"]
    code, _, err = command("pack", run.folder, "--held-out-rows", "-o", "run.tar.gz")
    assert code == 0, err
    write_rows(tmp_path / "there" / "train.jsonl", rows_of(44)[22:])
    code, _, err = command("pack", run.folder, "--held-out-rows", "-o", "changed.tar")
    assert code == 2 and "not those of its training" in err and not Path("changed.tar").exists(), err
    shutil.rmtree(tmp_path / "there")
    code, out, err = command("unpack", "run.tar.gz", "--json")
    assert code == 0 and "model/model.safetensors" in json.loads(out)["files"], err
    rows = [json.loads(line) for line in Path("run/rows/eval/0/held-out.jsonl").read_text().splitlines()]
    assert 0 < len(rows) < 22 and all(row in rows_of(22) for row in rows)
    code, out, err = command("eval", "run", "--json")  # the base of a full fine-tuning is not needed
    assert code == 0 and not notes(err) and "its base model is not here" in err, err
    assert json.loads(out)["rows"]["count"] == len(rows) and list(json.loads(out)["models"]) == ["model"]
    code, out, err = command("eval", "run", "--base", tiny_base, "--json")
    assert code == 0 and not notes(err) and list(json.loads(out)["models"]) == ["base", "model"], err
    from lorakit.prepare import reopen_run
    from lorakit.progress import Silent

    _, prepared = reopen_run(Path("run"), Silent(), str(tiny_base))
    assert prepared.held_out.tokens_sha256() == expected
    code, _, err = command("export", "run", "--to", "vllm", "--quiet")
    assert code == 0 and not notes(err), err


def test_the_recipe_tells_no_token_and_no_name_of_the_home(tmp_path, tiny_base, elsewhere, command, monkeypatch):
    home, token = tmp_path / "people" / "alice", f"hf_{'a1B2' * 8}"
    base = shutil.copytree(tiny_base, home / "models" / "base")
    data = {"eval": 0.3, "max_length": 512, "system": f"/a/b or {token}, of {home}/notes."}
    run = make_run(tmp_path / "there", base, data=data, train={"epochs": ..., "steps": 1})
    monkeypatch.setenv("HOME", str(home))
    code, out, err = command("pack", run.folder, "--training-rows", "-o", "run.tar")
    assert code == 0 and "was taken out of data" in err, err
    assert "without" not in out  # the held-out rows are a share of the packed ones
    content = Path("run.tar").read_bytes()
    assert token.encode() not in content and b"alice" not in content and b"../models/base" in content
    assert "eval run (--base" in command("unpack", "run.tar", "-o", "run")[1]
    assert "system: /a/b or (redacted), of (path)/notes." in Path("run/recipe.yaml").read_text()


def test_the_home_of_another_user_is_not_named_either(tmp_path, tiny_base, elsewhere, command, monkeypatch):
    base = shutil.copytree(tiny_base, tmp_path / "people" / "bob" / "models" / "base")
    run = make_run(tmp_path / "srv" / "runs", base, train={"epochs": ..., "steps": 1})
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "alice"))
    assert command("pack", run.folder, "-o", "run.tar")[0] == 0
    content = Path("run.tar").read_bytes()
    assert b"bob" not in content and b"../models/base" in content


@pytest.mark.parametrize("text", [b"", b"a few words\n", b"words\n" * 200])
def test_another_file_is_called_no_packed_run(tmp_path, command, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for name, content in {"notes.txt": text, "notes.tar.gz": gzip.compress(text)}.items():
        Path(name).write_bytes(content)
        code, _, err = command("unpack", name)
        assert code == 2 and f"{name}: not a packed run" in err and "cut short" not in err


@pytest.mark.slow
def test_rows_in_folders_and_patterns_and_under_any_name_are_packed_in_their_order(tmp_path, tiny_base, elsewhere):
    from lorakit.prepare import reopen_run
    from lorakit.progress import Silent
    from lorakit.share.contents import PackOptions
    from lorakit.share.pack import pack

    more = tmp_path / "there" / "more"
    more.mkdir(parents=True)
    for number, name in enumerate(("b ü.jsonl", "a:1.jsonl", f"{'x' * 150}.jsonl", ".hidden.jsonl")):
        write_rows(more / name, rows_of(40)[30 + number : 31 + number])
    data = {"eval": ["more/*.jsonl", "more/.hidden.jsonl"], "train": ["train.jsonl", {"path": "more/../more2"}]}
    shutil.copytree(more, tmp_path / "there" / "more2")
    data["clean"] = {"leakage": "off", "near_leakage": "off"}
    run = make_run(tmp_path / "there", tiny_base, data=data, train={"steps": 1})
    tokens = run.read_manifest()["data"]["tokens_sha256"]
    pack(run, elsewhere / "x.tar.gz", PackOptions(held_out_rows=True, training_rows=True), Silent())
    shutil.rmtree(tmp_path / "there")
    told = Remembers()
    again, prepared = reopen_run(unpacked(Path("x.tar.gz"), Path("new")).folder, told, str(tiny_base))
    assert prepared.tokens_sha256 == tokens and not told.warned
    assert str(tmp_path) not in again.manifest.read_text() + again.recipe.read_text()


def unpacked(archive, folder):
    shutil.rmtree(folder, ignore_errors=True)
    from lorakit.share.unpack import unpack

    return unpack(archive, folder).run


def test_a_base_is_known_by_its_content_wherever_it_lies(packs, elsewhere, command, tiny_base):
    run = unpacked(packs / "rows.tar.zst", elsewhere / "runs" / "mine")
    code, _, err = command("eval", run.folder)
    assert code == 2 and "its base model is not at" in err and "Write --base with the folder or hub id" in err
    other = shutil.copytree(tiny_base, elsewhere / "runs" / "base")  # where the recipe of the run leads by accident
    edit_json(other / "config.json", rms_norm_eps=0.5)
    for arguments in (("eval",), ("merge", "-o", elsewhere / "m"), ("export", "--to", "vllm"), ("chat",)):
        code, _, err = command(arguments[0], run.folder, *arguments[1:])
        assert code == 2 and "was trained on other weights or another configuration" in err, err
    code, _, err = command("eval", run.folder, "--base", elsewhere / "nothing")
    assert code == 2 and "--base:" in err, err
    code, _, err = command("benchmark", run.folder, "--tasks", "x", "--base", other)
    assert code == 2 and "was trained on other weights" in err, err
    code, _, err = command("eval", tiny_base, "--base", other, "--data", write_rows(elsewhere / "r.jsonl", rows_of(2)))
    assert code == 2 and "--base: none of these is a run or an adapter" in err, err


@pytest.mark.slow
def test_runs_are_combined_on_a_base_that_lies_elsewhere(packs, elsewhere, command):
    runs = [unpacked(packs / "rows.tar.zst", elsewhere / name).folder for name in ("one", "two")]
    how = ("--method", "cat", "--weights", "0.5,0.5", "-o", "both", "--base", packs / "base", "--json")
    code, out, err = command("combine", *runs, *how)
    assert code == 0 and not notes(err) and [one["rows"] for one in json.loads(out)["scores"]] == [10, 10], err


@pytest.mark.slow
def test_an_adapter_alone_knows_its_base_by_content(packs, elsewhere, command, tiny_base):
    alone = shutil.copytree(unpacked(packs / "plain.tar", elsewhere / "x").adapter, elsewhere / "alone")
    rows = write_rows(elsewhere / "rows.jsonl", rows_of(4))
    code, _, err = command("eval", alone, "--data", rows)
    assert code == 2 and "Write --base with the folder or hub id" in err, err
    code, _, err = command("eval", alone, "base", "--data", rows, "--base", packs / "base")
    assert code == 0 and not notes(err), err
    code, _, err = command("merge", alone, "--base", packs / "base", "--no-proof")
    assert code == 0 and not notes(err), err
    other = shutil.copytree(tiny_base, elsewhere / "other")
    edit_json(other / "config.json", rms_norm_eps=0.5)
    code, _, err = command("merge", alone, "--base", other, "-o", elsewhere / "m", "--no-proof")
    assert code == 0 and "was trained on other weights than those of" in err, err


def test_other_rows_at_the_place_of_a_run_s_are_not_taken_for_them(packs, elsewhere, command):
    run = unpacked(packs / "plain.tar", elsewhere / "runs" / "mine")
    options = (run.folder, "--base", packs / "base")
    code, _, err = command("eval", *options)
    assert code == 2 and "eval.jsonl: there is no such file. Give other rows with --data FILE" in err
    other = write_rows(elsewhere / "runs" / "eval.jsonl", rows_of(8))
    code, _, err = command("eval", *options)
    assert code == 2 and "not the rows of this run's training: their sha256 is another" in err
    code, out, err = command("eval", *options, "--data", other, "--json")
    assert code == 0 and json.loads(out)["rows"]["count"] == 8, err
    write_rows(other, rows_of(40)[30:])  # the same content at another place is the run's
    code, _, err = command("eval", *options)
    assert code == 0 and not notes(err), err


@pytest.mark.slow
def test_rows_of_another_shape_are_read_by_format_and_columns(packs, elsewhere, command):
    run = unpacked(packs / "plain.tar", elsewhere / "mine")
    rows = write_rows(elsewhere / "odd.jsonl", [{"q": f"Tell me about lamps, {at}.", "a": "{}"} for at in range(3)])
    common = (run.folder, "--base", packs / "base", "--data", rows)
    given = ("--format", "question-answer", "--columns", "question=q,answer=a")
    code, out, err = command("eval", *common, *given, "--json")
    assert code == 0 and json.loads(out)["rows"]["count"] == 3, err
    code, out, err = command("merge", *common, *given)
    assert code == 0 and "3 rows of" in out, err
    for wrong, words in {
        ("--format", "question-answr"): "Did you mean question-answer?",
        ("--columns", "question"): "'question' is not ours=theirs",
        ("--columns", "question=q,question=a"): "question is there twice",
        ("--columns", "question=qq,answer=a"): "a column that no row has",
    }.items():
        code, _, err = command("eval", *common, *wrong)
        assert code == 2 and words in err, err
    code, _, err = command("eval", run.folder, "--format", "text")
    assert code == 2 and "--format: is of the rows of --data FILE, and none are given" in err


def rewritten(packs, target, change):
    """The plain archive with its members, and its index, changed."""
    parts = [(info.name, content, info.type, info.size) for info, content in members(packs / "plain.tar")]
    index = json.loads(parts[0][1])
    parts = change(parts, index) or parts
    if parts and parts[0][1] is not None and parts[0][0].endswith("pack.json"):
        content = index_text(index).encode() if isinstance(index, dict) else index
        parts[0] = (parts[0][0], content, tarfile.REGTYPE, len(content))
    with target.open("wb") as file:
        for name, content, kind, size in parts:
            info = tarfile.TarInfo(name)
            info.size, info.type = (size if size is not None else len(content)), kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname, info.size = "/etc/passwd", 0
            file.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    return target


def add(name, content=b"x", kind=tarfile.REGTYPE, indexed=True):
    from hashlib import sha256

    def change(parts, index):
        if indexed:
            index["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        others = [*parts[1:], (f"run/{name}", content, kind, len(content))]
        return [parts[0], *sorted(others, key=lambda part: part[0])]

    return change


def drop(name):
    return lambda parts, _: [part for part in parts if part[0] != f"run/{name}"]


def set_index(**changes):
    return lambda parts, index: index.update(changes)


def lie(name, **facts):
    return lambda parts, index: index["files"][name].update(facts)


def swap(name, content):
    return lambda parts, _: [
        (n, content if n == f"run/{name}" else c, k, len(content) if n == f"run/{name}" else s) for n, c, k, s in parts
    ]


HOSTILE = {
    "above": (add("adapter/../../x"), "leads out of the run"),
    "absolute": (add("/etc/x"), "leads out of the run"),
    "hidden": (add("adapter/.bashrc"), "is hidden"),
    "backslash": (add("adapter\\x"), "a character that is not allowed"),
    "control": (add("adapter/a\nb"), "a character that is not allowed"),
    "foreign": (add("setup.py"), "is none that a run has"),
    "case": (add("adapter/readme.MD"), "are the same to some systems"),
    "file and folder": (add("log.jsonl/x"), "is none that a run has"),
    "below a file": (add("adapter/README.md/x"), "are the same to some systems"),
    "symlink": (add("adapter/z", b"", tarfile.SYMTYPE), "is not a plain file"),
    "hard link": (add("adapter/z", b"", tarfile.LNKTYPE), "is not a plain file"),
    "device": (add("adapter/z", b"", tarfile.CHRTYPE), "is not a plain file"),
    "folder": (add("adapter/z", b"", tarfile.DIRTYPE), "is not a plain file"),
    "long name": (add("adapter/z", b"", tarfile.GNUTYPE_LONGNAME), "is not a plain file"),
    "not in the index": (add("adapter/zzz", indexed=False), "is where the index has"),
    "at the end": (add("zzz", indexed=False), "is in the archive and not in the index"),
    "missing": (drop("recipe.yaml"), "is in the index and not in the archive"),
    "twice": (lambda parts, _: [parts[0], parts[1], *parts[1:]], "is where the index has"),
    "another sha256": (lie("recipe.yaml", sha256="0" * 64), "its sha256 is not that of the index"),
    "another size": (lie("recipe.yaml", bytes=7), "and the index says 7"),
    "a bomb": (lie("recipe.yaml", bytes=10**18), "its files take"),
    "no size": (lie("recipe.yaml", bytes="7"), "a size or a sha256 is none"),
    "negative": (lie("recipe.yaml", bytes=-1), "a size or a sha256 is none"),
    "no sha256": (lie("recipe.yaml", sha256=7), "is damaged"),
    "another format": (set_index(format=2), "has the format 2"),
    "no files": (set_index(files=[]), "is damaged"),
    "not a run": (set_index(files={}), "without which it is not a run"),
    "too many": (
        set_index(files={f"eval/{at}": {"bytes": 0, "sha256": "0" * 64} for at in range(10_001)}),
        "names 10,001",
    ),
    "no index": (lambda parts, _: parts[1:], "does not begin with pack.json"),
    "other weights": (swap("adapter/adapter_model.safetensors", b"x"), "and the index says"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(packs, elsewhere, command, name):
    change, words = HOSTILE[name]
    file = rewritten(packs, elsewhere.parent / "bad.tar", change)
    code, out, err = command("unpack", file, "-o", "new")
    assert code == 2 and words in err and "Nothing was unpacked" in err and not out, err
    assert not [*elsewhere.iterdir()]


def test_a_damaged_archive_is_refused_wherever_it_is_cut(packs, elsewhere, command):
    for name in ("plain.tar", "rows.tar.zst", "all.tar.gz"):
        whole = (packs / name).read_bytes()
        for content in (
            whole[: len(whole) // 2],
            whole[:-9],
            whole[:3],
            b"",
            b"\0" * 2048,
            whole[:700] + b"?" + whole[701:],
        ):
            file = elsewhere.parent / f"cut-{name}"
            file.write_bytes(content)
            code, _, err = command("unpack", file, "-o", "new")
            assert code == 2 and "Traceback" not in err and not [*elsewhere.iterdir()], (name, len(content), err)
    (elsewhere.parent / "long.tar").write_bytes((packs / "plain.tar").read_bytes() + b"more")
    code, _, err = command("unpack", elsewhere.parent / "long.tar", "-o", "new")
    assert code == 2 and "something follows after its end" in err


def test_nothing_that_exists_is_replaced(packs, elsewhere, command):
    (elsewhere / "there").mkdir()
    code, _, err = command("unpack", packs / "plain.tar", "-o", "there")
    assert code == 2 and "already exists, and nothing is replaced" in err and not [*(elsewhere / "there").iterdir()]
    run = unpacked(packs / "plain.tar", elsewhere / "mine")
    file = elsewhere / "x.tar"
    file.write_text("mine")
    code, _, err = command("pack", run.folder, "-o", file)
    assert code == 2 and "already exists" in err and file.read_text() == "mine"


def test_what_cannot_be_packed_is_refused_with_the_reason(packs, elsewhere, command):
    run = unpacked(packs / "plain.tar", elsewhere / "mine")
    for arguments, words in {
        (run.folder, "-o", "x.zip"): "Write one that ends in .tar.zst, .tar.gz, .tar",
        (run.folder, "-o", "x.tar", "--held-out-rows"): "eval.jsonl: there is no such file",
        (run.folder, "-o", "x.tar", "--training-rows"): "train.jsonl: there is no such file",
        (run.folder, "-o", "x.tar", "--merged"): "has no merged model",
        (run.folder, "-o", "x.tar", "--base", "x"): "--base: is for held-out rows",
        (elsewhere / "none", "-o", "x.tar"): "there is no such run",
        (elsewhere, "-o", "x.tar"): "not a run folder",
    }.items():
        code, _, err = command("pack", *arguments)
        assert code == 2 and words in err and not (elsewhere / "x.tar").exists(), err
    (run.evaluations / "20200101T000001.json").write_text('{"format": 2, "models": 5, "findings": []}')
    code, _, err = command("pack", run.folder, "-o", "less.tar")
    assert code == 0 and "20200101T000001.json: these scores are damaged" in err, err
    (run.adapter / "README.md").unlink()
    (run.adapter / "README.md").symlink_to("/etc/hostname")
    code, _, err = command("pack", run.folder, "-o", "x.tar")
    assert code == 2 and "is a link to a file outside of the run" in err, err
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x")
    code, _, err = command("pack", run.folder, "-o", "x.tar")
    assert code == 2 and "is not what this run trained" in err
    edit_json(run.manifest, status="running")
    code, _, err = command("pack", run.folder, "-o", "x.tar")
    assert code == 2 and "its training has not ended" in err
