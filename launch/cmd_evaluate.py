"""Identification and verification numbers, with intervals, counts and the rule they follow.

`aroface evaluate PROTOCOL --help` lists the options of a protocol.
"""

import argparse

from launch.subcommands import declare, run_chosen

#: protocol -> (module with add_arguments and run, one line of help)
PROTOCOLS: dict[str, tuple[str, str]] = {
    "identification": ("launch.evaluate_identification", "1:N search on embedding files, closed and open set"),
    "verification": ("launch.evaluate_verification", "1:1 comparison of listed pairs of an embedding file"),
    **{
        name: ("launch.evaluate_pairs", f"{title}: 10-fold accuracy and TAR, from a .bin or a list of pairs")
        for name, title in (
            ("lfw", "Labeled Faces in the Wild"),
            ("cfp_fp", "CFP frontal to profile"),
            ("cfp_ff", "CFP frontal to frontal"),
            ("agedb_30", "AgeDB, 30 years"),
            ("calfw", "Cross-Age LFW"),
            ("cplfw", "Cross-Pose LFW"),
            ("vgg2_fp", "VGGFace2 frontal to profile"),
            ("xqlfw", "Cross-Quality LFW"),
        )
    },
    "tinyface": ("launch.evaluate_tinyface", "TinyFace: Rank-k and mAP among 153,428 distractors"),
    "ijbb": ("launch.evaluate_ijb", "IJB-B: 1:1, covariates and 1:N mixed media"),
    "ijbc": ("launch.evaluate_ijb", "IJB-C: 1:1, covariates and 1:N mixed media"),
    "ijbs": ("launch.evaluate_ijbs", "IJB-S: surveillance, UAV and multi-view, all five experiments"),
    "survface": ("launch.evaluate_survface", "QMUL-SurvFace: open-set identification, verification"),
    "scface": ("launch.evaluate_scface", "SCface: cameras at three distances against mugshots"),
    "templates": ("launch.evaluate_templates", "any set of templates, from templates.csv and samples.csv"),
    "compare": ("launch.evaluate_compare", "paired comparison of two systems, from files of --details"),
    "lfw-lq": ("launch.evaluate_lfw_lq", "low-quality identification: shrunk, compressed, misaligned probes"),
    "fae": ("launch.evaluate_fae", "robustness to misalignment (FAE-1): accuracy against angle, shift and scale"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the protocols; each reads its own options."""
    declare(parser, PROTOCOLS, what="protocol")


def run(args: argparse.Namespace) -> int:
    """Run one protocol."""
    return run_chosen(args, PROTOCOLS, command="evaluate")
