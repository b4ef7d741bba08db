"""Small protocol sets in the exact layout of the originals, with embeddings that belong to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

from retrieval.embedding_files import write_embeddings
from retrieval.embeddings import EmbeddingSet

DIM = 24
CONTRACT = {"image_size": 112, "colour_order": "rgb", "mean": 127.5, "std": 127.5, "template": "arcface_112"}


def embeddings_of(people: Sequence[int], *, noise: float = 0.6, seed: int = 0) -> np.ndarray:
    """One embedding per image: the direction of its person and noise."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(max(people) + 1 if len(people) else 1, DIM))
    return (centres[list(people)] + noise * generator.normal(size=(len(people), DIM))).astype(np.float32)


def write_keyed(path: Path, keys: Sequence[str], values: np.ndarray) -> Path:
    """An embedding file with names, in another order than the protocol's."""
    order = np.random.default_rng(5).permutation(len(keys))
    metadata = {"model_id": "test", "flip": "sum", "contract": CONTRACT}
    names = np.array(keys)[order]
    write_embeddings(path, EmbeddingSet(values[order], np.zeros(len(keys), int), keys=names, metadata=metadata))
    return path


def cells(values: Sequence[str], columns: int = 1) -> np.ndarray:
    """A MATLAB cell array of strings."""
    array = np.empty((len(values) // columns, columns), object)
    array.reshape(-1)[:] = list(values)
    return array


def write_tinyface(folder: Path) -> tuple[list[str], list[int]]:
    """6 people with 2 gallery images and 2 probes each, 20 distractors; returns all keys and their people."""
    folder.mkdir(parents=True)
    gallery = [f"{p}_{i}.jpg" for p in range(1, 7) for i in (1, 2)]
    probes = [f"{p}_{i}.jpg" for p in range(1, 7) for i in (3, 4)]
    ids = np.repeat(np.arange(1, 7), 2)[:, None].astype(np.uint16)
    savemat(folder / "gallery_match_img_ID_pairs.mat", {"gallery_set": cells(gallery), "gallery_ids": ids})
    savemat(folder / "probe_img_ID_pairs.mat", {"probe_set": cells(probes), "probe_ids": ids})
    distractors = [f"distractor_{i}.jpg" for i in range(20)]
    keys = [f"Probe/{n}" for n in probes] + [f"Gallery_Match/{n}" for n in gallery]
    people = [int(n.split("_")[0]) for n in probes + gallery]
    return keys + [f"Gallery_Distractor/{n}" for n in distractors], people + list(range(10, 30))


def write_ijb(meta: Path, *, name: str = "ijbc") -> tuple[list[str], list[int]]:
    """8 people: a gallery template of 3 images in 2 media each, 2 probe templates of 2 images; pairs and 1:N lists."""
    meta.mkdir(parents=True)
    rows, people, number = [], [], 0
    templates: list[tuple[int, int, str]] = []  # template, person, role
    for person in range(8):
        for role, media in (("g", (1, 1, 2)), ("p", (3, 3)), ("q", (4, 5))):
            template = 10 * person + 7 * "gpq".index(role) + 100
            templates.append((template, person, role))
            for medium in media:
                number += 1
                rows.append((f"{number}.jpg", template, 1000 * person + medium))
                people.append(person)
    generator = np.random.default_rng(1)
    scores = generator.uniform(0.5, 1, len(rows))
    (meta / f"{name}_face_tid_mid.txt").write_text("".join(f"{n} {t} {m}\n" for n, t, m in rows))
    points = "38.2946 51.6963 73.5318 51.5014 56.0252 71.7366 41.5493 92.3655 70.7299 92.2041"
    lines = (f"{n} {points} {s:.4f}\n" for (n, _, _), s in zip(rows, scores, strict=True))
    (meta / f"{name}_name_5pts_score.txt").write_text("".join(lines))
    galleries = [t for t in templates if t[2] == "g"]
    probes = [t for t in templates if t[2] != "g"]
    pairs = [(g, p, int(gp == pp)) for g, gp, _ in galleries for p, pp, _ in probes]
    (meta / f"{name}_template_pair_label.txt").write_text("".join(f"{a} {b} {c}\n" for a, b, c in pairs))
    (meta / f"{name}_11_G1_G2_matches.csv").write_text("".join(f"{a},{b}\n" for a, b, _ in pairs))
    by_template: dict[int, list[str]] = {}
    for image, template, _ in rows:
        by_template.setdefault(template, []).append(image)
    first, second = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}[name]
    parts = {f"gallery_{first}": galleries[:4], f"gallery_{second}": galleries[4:], "probe_mixed": probes}
    for part, listed in parts.items():
        text = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
        text += "".join(f"{t},{p},{image}\n" for t, p, _ in listed for image in by_template[t])
        (meta / f"{name}_1N_{part}.csv").write_text(text)
    return [row[0] for row in rows], people


def write_covariates(meta: Path, *, name: str = "ijbc") -> tuple[list[str], list[int], list[tuple[int, int]]]:
    """NIST's covariate test: 10 people with 4 single-image templates each, of numbers in no order; and its matches."""
    meta.mkdir(parents=True)
    generator = np.random.default_rng(3)
    ids = generator.permutation(np.arange(1000, 1040)).tolist()
    people = [row % 10 for row in range(40)]
    names = [f"{'img' if row % 2 else 'frames'}/{5000 + row}.jpg" for row in range(40)]
    head = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT,YAW\n"
    rows = zip(ids, people, names, strict=True)
    lines = (f"{t},{70 + p},{n},{i},1,2,30,40,{'side' if i % 3 else 'front'}\n" for i, (t, p, n) in enumerate(rows))
    (meta / f"{name}_11_covariate_probe_reference.csv").write_text(head + "".join(lines))
    matches = [(a, b) for a in range(20) for b in range(20, 40)]
    text = "".join(f"{ids[a]},{ids[b]}\n" for a, b in matches)
    (meta / f"{name}_11_covariate_matches.csv").write_text(text)
    return names, people, matches


def write_ijbs(folder: Path) -> tuple[list[str], list[int]]:
    """6 subjects: 3 videos and 2 booking images each; video 3 of a subject is the surveillance gallery."""
    (folder / "galleries").mkdir(parents=True)
    metadata, keys, people = "SUBJECT_ID,FILENAME,X\n", [], []
    files: dict[str, str] = {}
    for subject in range(1, 7):
        for video in (1, 2, 3):
            metadata += f"{subject},videos/{subject}{video}.mp4,0\r\n"
            if (subject, video) != (6, 2):  # nobody was detected there
                keys += [f"{subject}/videos_{subject}{video}_{frame}.jpg" for frame in range(1, 3 + video)]
        metadata += f"{subject},img/{subject}01.png,0\n{subject},img/{subject}02.png,0\n"
        keys += [f"{subject}/img_{subject}01.jpg", f"{subject}/img_{subject}02.jpg"]
    files["cs6_metadata.csv"] = metadata
    head = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
    for number, subjects in ((1, (1, 2, 3)), (2, (4, 5, 6))):
        name = "galleries/cs6_surveillance_to_{}_g" + f"{number}.csv"
        files[name.format("single")] = head + "".join(f"{s},{s},img/{s}01.png\n" for s in subjects)
        files[name.format("booking")] = head + "".join(f"{s},{s},img/{s}0{i}.png\n" for s in subjects for i in (1, 2))
        files[name.format("surveillance")] = head + "".join(f"{s},{s},videos/{s}3.mp4\n" for s in subjects)
    listed = "FILENAME\n" + "".join(f"videos/{s}{v}.mp4\n" for s in range(1, 7) for v in (1, 2))
    files["cs6_surveillance_to_single-booking_probe.csv"] = listed
    files["cs6_surveillance_to_surveillance_probe.csv"] = listed
    files["cs6_uav_to_single-booking_probe.csv"] = "FILENAME\n" + "".join(f"videos/{s}3.mp4\n" for s in range(1, 7))
    for name, text in files.items():
        (folder / name).write_text(text)
    people = [int(key.split("/")[0]) for key in keys]
    return keys, people


def write_survface(folder: Path) -> tuple[list[str], list[int]]:
    """5 people with 3 gallery images and 2 probes, 8 unmated probes; 20 genuine and 20 impostor pairs."""
    folder.mkdir(parents=True)
    gallery = [f"{p}_cam1_{i}.jpg" for p in range(1, 6) for i in range(3)]
    probes = [f"{p}_cam2_{i}.jpg" for p in range(1, 6) for i in range(2)]
    unmated = [f"distractors_{i}.jpg" for i in range(8)]
    of = {"gallery": (gallery, 3), "mated_probe": (probes, 2)}
    for name, (listed, count) in of.items():
        ids = np.repeat(np.arange(1, 6), count)[:, None]
        savemat(folder / f"{name}_img_ID_pairs.mat", {f"{name}_set": cells(listed), f"{name}_ids": ids})
    savemat(folder / "positive_pairs_names.mat", {"positive_pairs_names": cells(gallery[:2] + gallery[3:5], 2)})
    savemat(folder / "negative_pairs_names.mat", {"negative_pairs_names": cells([gallery[0], gallery[3]] * 2, 2)})
    keys = [f"{part}/{n}" for part, (listed, _) in of.items() for n in listed] + [f"unmated_probe/{n}" for n in unmated]
    return keys, [int(n.split("_")[0]) for n in gallery + probes] + list(range(20, 28))


#: Lines of `write_manifest`: two people in the gallery, three of four probes mated.
TEMPLATES = [
    "g1,1,gallery,G,",
    "g2,2,gallery,G,",
    "p1,1,probe,,5",
    "p2,2,probe,,10",
    "p3,9,probe,,10",
    "p4,1,probe,,10",
]
SAMPLES = ["g1,m,1/a.jpg", "g2,m,2/a.jpg", "p1,m,1/b.jpg", "p1,m,1/c.jpg", "p2,m,2/b.jpg", "p3,m,9/a.jpg"]


def write_manifest(folder: Path, templates: list[str], samples: list[str]) -> Path:
    """A set of the protocol `templates`: lines of its two tables."""
    folder.mkdir(exist_ok=True)
    (folder / "templates.csv").write_text("\n".join(["template_id,subject_id,role,gallery_name,distance", *templates]))
    (folder / "samples.csv").write_text("\n".join(["template_id,media_id,path", *samples]))
    return folder
