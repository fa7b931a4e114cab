"""Holds figures that stand in more than one place to each other: python docs/figures.py [root].

Prints every place that lacks its figure, and exits with 1 if there is one. To change a figure,
change it in BUILD_NOTES.md, whose tables are the source, here, and wherever this then says.
"""

import pathlib
import re
import sys
from collections.abc import Iterator

NOTES, README = "BUILD_NOTES.md", "README.md"

# Name, values, {place: text, or several}; places without a suffix are pages. In a text {0} is the
# first value, {1:.0f} the second one rounded, and … anything within a cell of a table.
# fmt: off
FIGURES = [
    ("seconds of digits, language, diffusion, weights", (98, 195, 481, 583, 851, 14), {
        NOTES: ("{0} s by its own clock on one machine of two cores, {1} s on", ".language`: {2} s",
                ".diffusion`: {3} s", "mlp, vit, resnet: {4} s"),
        README: "(two to four minutes on two cores;",
        "studies": ("is right; … | two to four minutes |", "{5} minutes for the first three",
                    "states a fact | eight to twenty minutes |",
                    "and DAS | eight to twenty minutes |"),
        "experiments/digits/__main__.py": "two to four minutes",
        "experiments/language/__main__.py": "eight to twenty minutes",
        "experiments/diffusion/__main__.py": "eight to twenty minutes"}),
    ("with weights: TracIn, EK-FAC", (14.3, 24.4, 10.1, 4.8, 18.6, 23, 37.7, 5.6, 43), {
        NOTES: ("| resnet | TracIn | {0} | {1} | … | +{2} [", "| gpt TracIn (27) | {3} | +{4} [",
                "| gpt EK-FAC (27) | {6} | +{7} ["),
        README: "from {0:.0f} to {1:.0f} % on a ResNet and from {3:.0f} to {5} % on the GPT",
        "limits": "({3:.0f} % LDS, {5} % with weights)",
        "weights": ("from {0:.0f} to {1:.0f} % LDS on a ResNet and from {3:.0f} to {5} % on the",
                    "EK-FAC there from {6:.0f} to {8} %")}),
    ("cases worse with weights; intervals", (33, 8, 7.4, 13, 8.1, 187, 198, 95, 46), {
        NOTES: ("of {0}: none at R = 64, 32 and 16 (in an earlier run one at 16, DAS, -{4})",
                "| cifar2 | {8}% |", "objective {1}, the worst -{2}", "unit RMS {3},",
                "{5} of {6}.", "188 of {6} cells ({7} %)"),
        README: "none of {0} cases clearly worse",
        "weights": ("none of {0} cases", "no | {1} |", "{5} of {6} cases"),
        "limits": ("{1} of {0} cases clearly worse, by up to {2}", "made {3} worse", "by {4})",
                   "{5} of {6} cases", "held {7} %", "reached {8} %")}),
    ("removal of a generated image's proponents", ("1.50", 1.46, "0.90"), {
        NOTES: "D-TRAK uniform {0} (0.14), learned {1} (0.26), random {2}",
        "limits": ("changed by {0} (l2", "and by {2} with others", "({1}); four images")}),
    ("the gain that is said", (9.5, 5.3), {
        NOTES: "| resnet EK-FAC (16) | … | +{1} [… | +{0} |", "limits": "said {0} and had {1}"}),
    ("weights in the larger study of digits", (33, 0.02, 4.7, 2.6, 6.2), {
        NOTES: ("all {0} gains are above zero, the least {1} points", "| 13.2 (+{2} [",
                "beats the true one by {3} to {4} points"),
        README: "raised all {0}, by up to {2} points", "weights": "all {0}, by {1} to {2} points",
        "methods": ("Of its {0} cells", "by {1} to {2} points", "by {3} to {4} points")}),
    ("the paper's weights in the larger study of language", (0.3, "8.0", 13.4, 5.3), {
        NOTES: ("| TracIn | 8.1 [… | {2} | +{3} [", "| GradCos | 8.3 [… | … | +{1} [",
                "| TRAK | 39.8 [… | … | +{0} ["),
        "weights": "raised all nine, by {0} to {1} points"}),
    ("the paper's weights in the larger study of diffusion", (0.7, 14.8), {
        NOTES: ("| TRAK | 21.0 [… | +{0} [", "| TracIn, even | 10.4 [… | … | … | +{1} ["),
        "weights": "96 queries of each) all nine, by {0} to {1}."}),
    ("concepts", (26, 73, 69), {
        NOTES: "| TracIn, even: uniform / own w / w_all | {0} / {1} / {2} |",
        "limits": "subject: {1} % of the ten strongest for {2}, of {0} without"}),
    ("weights between labels; queries for models", (3.5, 0.4, 10.1, -1.3, 0.8, 3.8), {
        NOTES: ("(TracIn {0} -> {1}, {2} -> {3})", "128 queries | +{4} [", "384 queries | +{5} ["),
        "limits": "{2} points before, {3} after; on a ViT {0} and {1}",
        "weights": "{4} points with 128 queries, {5} with 384, and 64 models {0} with 128"}),
    ("D-TRAK and DAS", (41.2, 61.5, 24.3, 33.9, 6.7, 48, 41.2, 61.5), {
        NOTES: ("| D-TRAK | {2} [… | … | {0} [", "| DAS | {3} [… | … | {1} [", "| {6} | +{4} ["),
        "methods": ("had {2} and DAS {3}, where they had {0} and {1}", "{6} (+{4}) | {7} (+0.0) |"),
        "limits": ("{2} against {0} % LDS", "DAS ({7} to -2.8)"), README: "{1:.0f} % for DAS",
        "weights": "from {6:.0f} to {5} %", "trust": "{1:.0f} % in the best case"}),
    ("unrolled scores", (83.8, 93.6, 63.9, 54.9, 56.2, 40.9, 96.7, 73.9), {
        NOTES: ("| unrolled | {0} [… | … | … | {4} [", "| unrolled | {1} [… | … | … | {5} [",
                "| EK-FAC | {2} [", "| EK-FAC | {3} [", "| unrolled | {6} [… | {7} ["),
        "trust": ("LDS of {0:.0f} % (MLP) and {1:.0f} % (ViT)", "had {2:.0f} and {3:.0f} %",
                "had {4:.0f} and {5:.0f} %", "had {6:.0f} % for the very run and {7:.0f} %")}),
    ("features over a gradient; milliseconds", ("0.70", 0.69, 0.77, 0.58, "1.00", 3.8, 40, 27,
                                                0.5, 345), {
        NOTES: ("dense layers | 16 | {1} (… | {2} |", "0.59, {3}, 0.60, 0.57 | 0.99-{4} |",
                "`--dense`): {5}", "({6} -> {7} ms)", "{8} ms instead of {9} for",
                "Goals: {0} of dense"),
        "how/linear_maps": ("16 | {1} | {2} |", "16 | {3} | {4} |", "take {5} on"),
        "limits": "signs take {5}.",
        "experiments/benchmarks/features.py": '"dense layers"): {0}',
        "jaxattr/fitting/covariances.py": "{6} ms against {7} for",
        "jaxattr/fitting/shampoo.py": "{8} ms for [8, 1, 1024] on two cores, {9} ms"}),
    ("compiling; tokens; tampering", (1.23, 2.3, 7.3, 0.1, 0.25, 607, 393, 1.4), {
        NOTES: ("| 4.3 | {0} | met |", "{1} to {2} times", "0.42 ({3}", "0.58 ({4})",
                "{5} changes found, {6} without effect", "{7} % of a build"),
        "CHANGELOG.md": ("0.9 to {0} times what `vmap(grad)` takes; it took {1} to {2} times",
                         "{3} to {4} of the time"),
        "how/identity": ("{5} changes were found, {6} had no effect", "cost {7} % of a build")}),
    ("store; two stages", (779, 872, 924, 1.12, 0.99, 48, 27, 4.6, 192, 99, 91), {
        NOTES: ("431, {0} and 544. float32", "799, {1} and 889", "875, {2} and 906",
                "score | {3} (", "top_k | {4} (",
                "{5} kills", "| {6} s | {7} s | {8} s |",
                "0.90 | 0.{10} | | | both ends | 0.69 | 0.87 | 0.{9} |"),
        "how/store": ("{0} MB", "at {1} and", "at {2}", "{3} times", "{4} times", "{5} times"),
        "start/pod": ("{6} s | {7} s | {8} s |", "{6} seconds and searched in {7};", "{8} seconds"),
        "methods": ("held {9} % of EK-FAC's", "200 proponents held {10} %")}),
    ("leaderboard", (31.1, 29.4, 30.2, 55.4, 6.5, "3.0", "45.0", 21.7, 20.3, 61.5, 41.2, 38.1,
                     56.2, 2.7, 25.8), {
        NOTES: ("embedding | … | 256 | {0} [", "BM25 | … | 256 | {1} [", "ASTRA | … | … | {3} [",
                "logits | … | 40 | {2} [", "+{4} [+2.7, +9.7] (ResNet), +{5} [",
                "TrackStar | … | … | {6} (",
                "GradCos | … | … | {7} [", "8 models | … | … | {8} [", "DAS | … | … | {9} [",
                "D-TRAK | … | … | {10} [", "pixels | … | … | {11} [", "1 run | … | … | {12} [",
                "2 runs | … | … | {13} [", "unrolled scores ({14})"),
        "methods": ("embedding | {0} |", "| BM25 | {1} |", "logits | {2} |", "| ASTRA | {3} |",
                    "{4} points above EK-FAC on a ResNet, {5} on a GPT", "| {6} (+0.2) | 13.2 (",
                    "led ({7},", "eight models ({8})", "DAS ({9})", "D-TRAK ({10},", "({11})",
                    "({12} % LDS, at 456", "roughly ({13} %)", "(12 queries) | {12} |",
                    "by {14} without those of one unrolled run"),
        "limits": "classifier was {6} %, and that of a GPT {3} %"}),
]
for line in ("TracIn 14.1 +0.1 10.3 +3.5 14.3 +10.1 12.6 +0.9 4.8 +18.6; GradCos 30.4 +1.1 21.7 "
             "+1.8 38.2 +2.8 8.7 +3.6 5.0 +17.9; TRAK 27.0 +0.7 15.3 +1.2 22.2 +5.0 21.2 +0.0 39.4 "
             "+0.3; LoGRA 32.3 -0.2 19.3 +0.3 35.3 +3.1 28.1 -0.0 37.4 -0.3; EK-FAC 37.1 +0.4 18.0 "
             "+0.8 27.1 +5.3 17.9 +0.4 37.7 +5.6").split("; "):  # LDS, and what weights add
    name, *values = line.split()
    FIGURES.append((f"{name} on five models", tuple(values), {
        NOTES: tuple(f"| {model} {name} (…) | {{{2 * i}}} | {{{2 * i + 1}}} ["
                     for i, model in enumerate(("mlp", "vit", "resnet", "cifar2", "gpt"))),
        "methods": f"| {name} |" + " {} ({}) |" * 5}))
for line in ("EShampoo 53.9 2.1; EK-FAC 52.4 3.1; K-FAC 37.5 6.0; EK-FAC 37.7 5.6; TRAK 39.4 0.3; "
             "TracIn 4.8 18.6; Fisher 38.8 4.0; GradCos 38.8 2.5; LoGRA 35.4 2.9; ASTRA 33.0 2.4; "
             "EShampoo 29.6 3.9; TRAK 29.7 1.7; EK-FAC 26.6 4.4; TracIn 12.3 9.6").split("; "):
    name, *values = line.split()
    FIGURES.append((f"{name} on the leaderboard", tuple(values), {
        NOTES: f"| {name}… | … | … | {{}} [… | +{{}} [", "methods": f"| {name}… | {{}} (+{{}}) |"}))
FIGURES.append(("on a GPU", (0.82, 15, 0.13, 7.4), {
    NOTES: ("batch 256 | its gradient, 0.03 ms per example | {0} (", "a CPU 3.1e-4,", "2.4e-7",
            "(4,688 rows) {1} s and 7 s",
            "1,024 features of the small GPT 19.5 -> {3} gradients",
            "| bergson (1.90 of torch's gradient) | {2} ("),
    "numbers": ("3e-4 from a CPU's", "differ by 2e-7"),
    "limits": ("features took {0} of a gradient's time", "{2} of bergson's",
               "would take {1} seconds", "dense signs {3} gradients")}))
# fmt: on


def disagreements(root: pathlib.Path) -> Iterator[str]:
    """Yields "place: expected text (figure)" for each text that is not found."""
    for name, values, places in FIGURES:
        for place, texts in places.items():
            place = place if "." in place else f"docs/pages/{place}.md"
            whole = " ".join((root / place).read_text().split())  # lines may be broken anywhere
            for text in [texts] if isinstance(texts, str) else texts:
                text = text.format(*values)
                if not re.search(re.escape(text).replace("…", "[^|]*?"), whole):
                    yield f"{place}: {text} ({name})"


if __name__ == "__main__":
    wrong = list(disagreements(pathlib.Path(sys.argv[1] if sys.argv[1:] else ".")))
    print("\n".join(wrong) or f"{len(FIGURES)} figures agree in all places.")
    sys.exit(bool(wrong))
