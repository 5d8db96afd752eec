"""From a folder to the files of a run, with a small network of random weights: what is promised, not how good it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns import group_photos
from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.photos import embed, group, outcome, road
from fastreid_uns.photos.adapt import Adaptation
from fastreid_uns.photos.addition import _extended, _raised, add_photos
from fastreid_uns.photos.album import read_album
from fastreid_uns.photos.decisions import Contradiction, Decisions
from fastreid_uns.photos.group import Features, Settings
from fastreid_uns.photos.identify import Identity, Thresholds
from fastreid_uns.photos.index import Index
from fastreid_uns.photos.known import Known, said
from fastreid_uns.photos.local import LocalMatch
from fastreid_uns.photos.network import describe
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.photos.teller import Teller
from fastreid_uns.photos.verdict import judge, open_pairs, questions
from fastreid_uns.predictor import FeatureExtractor

SIZE = (32, 32)


class Heard(Teller):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shares: list[float] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def share(self, stage: str, done: float, left: float | None) -> None:
        self.shares.append(done)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """A YAML of the usual network without its weights."""
    file = tmp_path_factory.mktemp("network") / "network.yaml"
    file.write_text("MODEL: {WEIGHTS: '', BACKBONE: {NAME: timm, MODEL: tf_efficientnet_lite0}}\n")
    return str(file)


def draw_things(folder: Path, things: range, each: range) -> None:
    """Photos of things: one pattern of colors a thing, with a little noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for thing in things:
        pattern = np.kron(np.random.default_rng(thing).integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1)))
        for number in each:
            noise = np.random.default_rng([thing, number]).normal(0, 4, pattern.shape)
            pixels = np.clip(pattern + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"Tier {thing}-ä{number}.png")


def thing_of(path: str) -> str:
    return path.rpartition("/")[2].split("-")[0]


def grouped(photos: Path, output: Path, network: str, **options) -> PhotoRun:
    return group_photos(photos, output, config_file=network, size=SIZE, **{"training": False, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory, network) -> tuple[PhotoRun, Heard]:
    """30 photos of 5 things, grouped; nobody changes this run."""
    place, heard = tmp_path_factory.mktemp("made"), Heard()
    draw_things(place / "my photos", range(5), range(6))
    return grouped(place / "my photos", place / "my photos" / "out", network, teller=heard), heard


@pytest.fixture
def run(made, tmp_path) -> PhotoRun:
    """A copy of it."""
    photos = made[0].photos
    shutil.copytree(photos, tmp_path / "photos", symlinks=True)
    output = tmp_path / "photos" / "out"
    copy = PhotoRun(output)
    copy.update(photos=str(tmp_path / "photos"))
    copy.link_groups()
    return copy


def parts(run: PhotoRun) -> dict[str, int]:
    return {member.path: member.group for member in run.groups()}


def test_groups_links_index_report_and_checkpoint_agree(made):
    run, _ = made
    members = run.groups()
    assert len(members) == 30
    assert {len({thing_of(m.path) for m in members if m.group == g}) for g in {m.group for m in members}} == {1}
    for member in members:
        link = run.folder / "groups" / f"{member.group:04d}" / member.path
        assert link.resolve() == run.photos / member.path
    index = Index.load(run.folder / "index.safetensors")
    assert index.paths == [member.path for member in members]
    assert index.groups.tolist() == [member.group for member in members]
    text = (run.folder / "report.html").read_text()
    assert "Tier 3-ä2.png" in text
    assert "unverified" in text
    about = run.about
    assert about["finished"]
    assert about["scan"]["found"] == 30
    assert about["size"] == [32, 32]
    assert set(about["seconds"]) >= {"read the photos", "group", "report"}


def test_what_was_found_is_said(made):
    _, heard = made
    assert heard.lines[0].startswith("30 photos in ")
    assert "weights: random numbers" in heard.lines
    assert heard.shares == sorted(heard.shares)
    assert heard.shares[-1] == pytest.approx(1)


def test_the_network_of_a_run_serves_other_tools(made):
    run, _ = made
    extractor = FeatureExtractor.from_checkpoint(run.folder, device="cpu")
    feats = extractor([str(run.photo("Tier 1-ä1.png")), str(run.photo("Tier 1-ä2.png"))])
    assert feats.shape == (2, extractor.dim)
    found = Index.load(run.folder / "index.safetensors").search(feats, 3)
    names = [run.groups()[row].path for row in found.rows[:, 0].tolist()]
    assert [thing_of(name) for name in names] == ["Tier 1", "Tier 1"]


def test_an_output_folder_inside_of_the_photos_is_not_read(run):
    album, _ = read_album({"": run.photos}, lambda line: None)
    assert len(album) == 30


def test_a_finished_run_is_not_overwritten(run, network):
    with pytest.raises(InvalidState, match=r"holds \d+ groups already.*--resume"):
        grouped(run.photos, run.folder, network)
    with pytest.raises(InvalidState, match="holds groups of"):
        grouped(run.photos.parent, run.folder, network)


@pytest.mark.parametrize("places", [False, True])
def test_the_same_call_goes_on_after_an_interruption(tmp_path, network, monkeypatch, places):
    draw_things(tmp_path / "photos", range(3), range(3))
    monkeypatch.setattr(road, "Adaptation", few_steps)
    clustered = []

    def watched(feats, settings, constraints=None, local=None):
        clustered.append(local)
        return group.cluster(feats, settings, constraints, local)

    monkeypatch.setattr(road, "cluster", watched)
    monkeypatch.setattr(group, "local_match", lambda found, *_: LocalMatch(found) if places else None)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(road, "members_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grouped(tmp_path / "photos", tmp_path / "out", network, training=True)
    monkeypatch.setattr(road, "embed", None)  # is not needed again
    heard = Heard()
    run = grouped(tmp_path / "photos", tmp_path / "out", network, training=True, teller=heard)
    assert any("features and weights are those of an earlier command" in line for line in heard.lines)
    assert len(run.groups()) == 9
    whole = grouped_anew(tmp_path, network, monkeypatch)
    assert parts(run) == parts(whole)
    assert [local is not None for local in clustered] == [places] * 3
    assert not places or torch.equal(clustered[0].descriptors, clustered[1].descriptors)
    assert run.about["settings"]["local descriptors"] == ("used" if places else "not used")
    assert (
        Index.load(run.folder / "index.safetensors").fingerprint
        == Index.load(whole.folder / "index.safetensors").fingerprint
    )


@pytest.mark.parametrize("training", [False, True])
def test_what_was_computed_before_an_interruption_is_not_computed_again(tmp_path, network, monkeypatch, training):
    draw_things(tmp_path / "photos", range(3), range(3))
    monkeypatch.setattr(road, "Adaptation", few_steps)
    monkeypatch.setattr(embed, "BATCH", 2)
    seen, limit = [], 3
    activations = embed.Stages.activations

    def counted(stages, images):
        seen.append(len(images))
        if len(seen) > limit:
            raise KeyboardInterrupt
        return activations(stages, images)

    monkeypatch.setattr(embed.Stages, "activations", counted)
    with pytest.raises(KeyboardInterrupt):
        grouped(tmp_path / "photos", tmp_path / "out", network, training=training)
    assert seen == [8, 8, 8, 8]  # two photos in four views; the fourth block was interrupted
    seen.clear()
    heard = Heard()
    run = grouped(tmp_path / "photos", tmp_path / "out", network, training=training, teller=heard)
    assert seen == [8, 4]  # photos 7 and 8, then the ninth
    assert "6 of 9 photos were done by an earlier command" in heard.lines
    assert heard.shares[-1] == pytest.approx(1)
    assert not (run.folder / "state" / "unfinished.bin").exists()
    limit = 9
    seen.clear()
    whole = grouped(tmp_path / "photos", tmp_path / "whole", network, training=training)
    assert parts(run) == parts(whole)
    one, other = (Index.load(made.folder / "index.safetensors") for made in (run, whole))
    assert torch.equal(one.features, other.features)
    assert one.fingerprint == other.fingerprint


def grouped_anew(tmp_path, network, monkeypatch) -> PhotoRun:
    from fastreid_uns.photos.group import embed

    monkeypatch.setattr(road, "embed", embed)
    return grouped(tmp_path / "photos", tmp_path / "whole", network, training=True)


def few_steps(steps: int = 2) -> Adaptation:
    return Adaptation(steps=steps, batch=4)


def test_answers_change_groups_and_numbers_stay(run):
    before = parts(run)
    one, other = sorted(set(before.values()))[:2]
    decisions = Decisions(run.folder / "decisions.csv")
    merged = [[path for path, group in before.items() if group == number] for number in (one, other)]
    decisions.merge(*merged)
    after = parts(group_photos(None, run.folder, resume=True))
    assert {after[path] for path in (*merged[0], *merged[1])} == {one}
    assert {path: after[path] for path in before if before[path] not in (one, other)} == {
        path: group for path, group in before.items() if group not in (one, other)
    }
    assert run.groups(1) != run.groups()
    assert {member.path: member.group for member in run.groups(1)} == before
    assert run.about["asked"]["size"] == list(SIZE)


def test_photos_that_are_different_come_apart(run):
    before = parts(run)
    largest = max(set(before.values()), key=list(before.values()).count)
    leaver, stayer = [path for path, group in before.items() if group == largest][:2]
    Decisions(run.folder / "decisions.csv").pair(leaver, stayer, "different")
    after = parts(group_photos(None, run.folder, resume=True))
    assert after[leaver] != after[stayer]


def test_answers_that_contradict_each_other_are_named(run):
    (run.folder / "decisions.csv").write_text(
        "time,kind,first,second,answer\n"
        "t,pair,Tier 0-ä0.png,Tier 0-ä1.png,same\nt,pair,Tier 0-ä0.png,Tier 0-ä1.png,different\n"
    )
    with pytest.raises(Contradiction, match=r"row 2 .* contradicts row 1"):
        group_photos(None, run.folder, resume=True)
    assert run.version == 1


def test_equal_files_share_a_group(tmp_path, network):
    draw_things(tmp_path / "photos", range(3), range(4))
    shutil.copy(tmp_path / "photos" / "Tier 1-ä1.png", tmp_path / "photos" / "copy.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "black.png")
    shutil.copy(tmp_path / "photos" / "black.png", tmp_path / "photos" / "black again.png")
    heard = Heard()
    found = parts(grouped(tmp_path / "photos", tmp_path / "out", network, teller=heard))
    assert found["copy.png"] == found["Tier 1-ä1.png"]
    assert found["black.png"] == found["black again.png"]
    assert any("2 photos more than once" in line for line in heard.lines)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_very_few_photos(tmp_path, network, count, training, monkeypatch):
    monkeypatch.setattr(road, "Adaptation", few_steps)
    draw_things(tmp_path / "photos", range(count), range(1))
    run = grouped(tmp_path / "photos", tmp_path / "out", network, training=training)
    assert len(run.groups()) == count
    assert "unverified" in run.about["audit"]["statement"] or "no pair" in run.about["audit"]["statement"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_no_photo_leaves_nothing_behind(tmp_path, network):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "IMG_1.HEIC").write_bytes(b"x")
    (photos / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(MissingFile, match=r"no photo can be read there \(1 unreadable, 1 passed over\)"):
        grouped(photos, tmp_path / "out", network)
    with pytest.raises(MissingFile, match="no such folder"):
        grouped(tmp_path / "none", tmp_path / "out", network)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidValue, match="same folder"):
        grouped(photos, photos, network)
    with pytest.raises(InvalidValue, match="no folder of photos is named"):
        group_photos(None, tmp_path / "out")
    for device in ("gpu", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises((InvalidState, InvalidValue), match=f"device: '?{device}"):
            grouped(photos, tmp_path / "out", network, device=device)
    assert not (tmp_path / "out").exists()


def test_photos_of_all_kinds(tmp_path, network):
    photos = tmp_path / "Fotos, März 2024"
    draw_things(photos, range(2), range(3))
    picture = Image.open(photos / "Tier 0-ä0.png").resize((48, 32))
    turned = picture.getexif()
    turned[0x0112] = 6
    picture.save(photos / "phone.jpg", exif=turned)
    picture.convert("RGBA").save(photos / "alpha.png")
    Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60).save(photos / "sixteen bit.tif")
    os.symlink(photos, photos / "loop")
    whole = (photos / "phone.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[:-40])
    (photos / "IMG_0001.HEIC").write_bytes(b"not read")
    heard = Heard()
    run = grouped(photos, tmp_path / "out", network, teller=heard)
    assert len(run.groups()) == 9
    assert any("1 .heic" in line for line in heard.lines)
    assert any("damaged and left out: cut.jpg" in line for line in heard.lines)
    assert run.about["scan"]["unreadable"] == 1
    assert (run.folder / "report.html").is_file()


def test_copies_instead_of_links(tmp_path, network):
    draw_things(tmp_path / "photos", range(2), range(2))
    run = grouped(tmp_path / "photos", tmp_path / "out", network, copy=True)
    files = [file for file in (run.folder / "groups").rglob("*") if file.is_file()]
    assert len(files) == 4
    assert not any(file.is_symlink() for file in files)


def test_an_output_folder_that_cannot_be_written(tmp_path, network):
    draw_things(tmp_path / "photos", range(2), range(2))
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InvalidState, match="cannot be"):
            grouped(tmp_path / "photos", output, network)


def test_two_processes_do_not_share_a_folder(run, network):
    with run.locked(), pytest.raises(InvalidState, match="another process works on this folder"):
        group_photos(None, run.folder, resume=True)


def test_a_full_disk_leaves_what_was_there(run, monkeypatch):
    before = parts(run), (run.folder / "groups.csv").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastreid_uns.utils.atomic.os.fsync", full)
        with pytest.raises(InvalidState, match="No space left on device"):
            group_photos(None, run.folder, resume=True)
    assert (parts(run), (run.folder / "groups.csv").read_bytes()) == before
    group_photos(None, run.folder, resume=True)
    assert parts(run) == before[0]


def test_photos_that_vanish_are_left_out(run):
    gone = run.groups()[0].path
    run.photo(gone).unlink()
    heard = Heard()
    group_photos(None, run.folder, resume=True, teller=heard)
    assert gone not in parts(run)
    assert len(parts(run)) == 29
    assert any("1 photos of the earlier groups are gone" in line for line in heard.lines)


# answers


def test_the_audit_asks_fifteen_pairs_inside_groups_and_believes_the_answers(run):
    pairs, groups = open_pairs(run), parts(run)
    assert len(pairs) == 15
    assert all(groups[first] == groups[second] for first, second in pairs)
    decisions = Decisions(run.folder / "decisions.csv")
    decisions.pair(*pairs[0], "unsure")
    assert len(open_pairs(run)) == 15
    assert pairs[0] not in open_pairs(run)
    while left := open_pairs(run):
        decisions.pair(*left[0], "same")
    precision = judge(run)
    assert precision.verified
    assert precision.estimate > 0.9
    audit = run.about["audit"]
    assert "unverified" not in audit["statement"]
    assert audit["advice"] == ""


def test_groups_that_fail_the_audit_come_with_advice(made, tmp_path):
    run = made[0]
    folder = tmp_path / "out"
    shutil.copytree(run.folder, folder, symlinks=True)
    copy = PhotoRun(folder)
    decisions = Decisions(folder / "decisions.csv")
    for first, second in copy.about["audit"]["pairs"][:15]:
        decisions.pair(first, second, "different")
    assert judge(copy).verified
    assert "Do not rely on these groups" in copy.about["audit"]["advice"]
    road.finish(copy)
    confidence = [member.confidence for member in copy.groups()]
    assert np.mean(confidence) < np.mean([member.confidence for member in run.groups()])
    assert "Do not rely on these groups" in (folder / "report.html").read_text()


def test_what_is_asked_outlives_the_calibration(run):
    asked = run.questions()
    Decisions(run.folder / "decisions.csv").pair(*open_pairs(run)[0], "same")
    version = run.version
    road.finish(run)
    assert run.version == version + 1
    assert run.questions() == asked


def test_the_page_asks_the_audit_first(run):
    from fastreid_uns.photos.questions import doubtful_pairs
    from fastreid_uns.photos.review import Review

    asked = questions(run, doubtful_pairs(run.groups()))
    assert [(one.first, one.second) for one in asked[:15]] == open_pairs(run)
    weights = [one.weight for one in asked]
    assert weights == sorted(weights, reverse=True)
    shown = Review(run, lambda: asked).questions(1)[0]
    assert shown["first"]["name"] == asked[0].first


# more photos


def test_added_photos_leave_groups_and_numbers_as_they_are(run, tmp_path):
    before = parts(run)
    draw_things(tmp_path / "season 2", range(4, 6), range(6, 11))
    done = add_photos(run, tmp_path / "season 2")
    after = parts(run)
    assert {path: after[path] for path in before} == before
    added = {path: group for path, group in after.items() if path not in before}
    assert {path.split("/")[0] for path in added} == {"season 2"}
    old = set(before.values())
    joined = [group for group in added.values() if group in old]
    founded = set(added.values()) - old
    assert all(group > max(old) for group in founded)
    assert done == (10, len(joined), len(set(joined)), len(founded))
    assert {member.path: member.group for member in run.groups(run.version - 1)} == before
    assert len(Index.load(run.folder / "index.safetensors")) == 40
    with pytest.raises(InvalidState, match="in it already"):
        add_photos(run, tmp_path / "season 2")
    again = parts(group_photos(None, run.folder, resume=True))
    assert again.keys() == after.keys()


def test_added_photos_join_the_group_that_they_resemble_or_found_one():
    directions = torch.eye(6)[[0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2]]
    wobble = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    feats = torch.nn.functional.normalize(directions + 0.02 * wobble)
    found, _ = _extended(feats, [1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0], Settings(k1=(3,), k2=1))
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2]
    together, _ = _extended(feats[[0, 0, 0, 0, 0]], [1, 1, 2, 2, 0], Settings(k1=(3,), k2=1))
    assert together.labels[0] == together.labels[1] != together.labels[2] == together.labels[3]


def test_known_groups_are_never_merged_by_added_photos(run, tmp_path):
    """All photos are those of one thing, so everything is near everything."""
    for number in range(6):
        source = run.photo(f"Tier 0-ä{number}.png")
        for thing in range(1, 5):
            shutil.copy(source, run.photo(f"Tier {thing}-ä{number}.png"))
    before = parts(run)
    draw_things(tmp_path / "more", range(1), range(7, 9))
    add_photos(run, tmp_path / "more")
    after = parts(run)
    assert {path: after[path] for path in before} == before


def test_identify(run):
    known = Known(run)
    names = ["Tier 2-ä1.png", "Tier 4-ä0.png"]
    files = [str(run.photo(name)) for name in names]
    before = parts(run)
    found = known.identify(files)
    things = {group: thing_of(path) for path, group in before.items()}
    assert [things[one.group] for one in found] == ["Tier 2", "Tier 4"]
    assert {one.kind for one in found} <= {"unsure", "new"}  # nobody has verified the groups
    assert known.identify_bytes(Path(files[0]).read_bytes())["group"] == found[0].group
    with pytest.raises(InvalidValue, match="the image cannot be read"):
        known.identify_bytes(b"no image")
    one, other = (sorted(path for path in before if before[path] == who.group) for who in found)
    Decisions(run.folder / "decisions.csv").merge(one, other)
    assert len({who.group for who in known.identify(files)}) == 1


def test_photos_that_are_new_to_all_that_was_fitted_raise_the_threshold(tmp_path, network, monkeypatch):
    draw_things(tmp_path / "photos", range(5), range(5))
    things = torch.eye(5).repeat_interleave(5, 0)
    monkeypatch.setattr(road, "embed", lambda *_, **__: Features(things, things[:, None]))
    for least, expected in ((-1.0, 0.0), (0.7, 0.7)):  # different things have a cosine of 0
        monkeypatch.setattr(outcome, "least_known", lambda views, groups, individuals, least=least: least)
        run = grouped(tmp_path / "photos", tmp_path / str(least), network)
        assert Index.load(run.folder / "index.safetensors").thresholds["known"] == pytest.approx(expected, abs=1e-6)


def test_added_photos_lower_no_threshold_from_which_one_is_known():
    found = Thresholds(known=0.5, new=0.2, doubtful=0.6)
    assert _raised(found, Thresholds(known=0.6, new=0.3, doubtful=0.5)) == (0.6, 0.2, 0.6)
    assert _raised(found, Thresholds(known=float("inf"), new=0.3, doubtful=float("inf"))) == found
    assert _raised(found, Thresholds(known=0.4, new=0.3, doubtful=0.7)) == (0.5, 0.2, 0.7)


def test_why_no_photo_is_called_known_is_said(run):
    known = Known(run)
    assert "were not checked; answer 15 questions" in known.caveat()
    audit = run.about["audit"]
    run.update(audit={**audit, "answers": 14})
    assert "answer 1 question with" in known.caveat()
    run.update(audit={**audit, "answers": 15, "verified": True, "precision": 0.79})
    assert "different individuals; mend the groups" in known.caveat()
    for precision, decides, other in ((0.8, "doubtful", "known"), (0.9, "known", "doubtful")):
        run.update(audit={**audit, "answers": 15, "verified": True, "precision": precision})
        known.index.thresholds |= {decides: 0.9, other: 0.8}
        assert known.caveat() == ""
        known.index.thresholds[decides] = float("inf")
        assert "too few" in known.caveat()
    assert said(Identity("unsure", 1, 0.5), "because") == {
        "answer": "unsure",
        "group": 1,
        "similarity": 0.5,
        "note": "because",
    }
    assert "note" not in said(Identity("new", 1, 0.5), "because")


@pytest.mark.parametrize("weights", ["nowhere.pth", "./nowhere", "/nowhere/net", "a/b.safetensors"])
def test_weights_that_are_not_there_are_no_network_of_timm(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match=rf"weights: there is no file {weights}\. Check the path"):
        describe(tmp_path, tmp_path / "out", SIZE, weights)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_no_generator_takes(tmp_path, network, seed):
    draw_things(tmp_path / "photos", range(2), range(2))
    with pytest.raises(InvalidValue, match=rf"seed is {seed}; whole numbers from 0 to 2,147,483,647 are accepted"):
        grouped(tmp_path / "photos", tmp_path / "out", network, seed=seed)
