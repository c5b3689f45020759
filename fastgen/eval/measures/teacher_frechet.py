"""Fréchet distance to the teacher's own images (FID-T): what the student lost, apart from what the teacher never had.

With as many images of the teacher as of the student; its bias is that of the number, and larger than that of the distance to a
large reference.
"""

from __future__ import annotations

from fastgen.eval.frechet import FrechetTo
from fastgen.eval.measures.fidelity import frechet
from fastgen.eval.registry import Evidence, Reading, Score, metric

READINGS = {"fd_teacher": Reading("Fréchet distance to the teacher", best="low")}


@metric("fd_teacher", needs=("images", "teacher"), readings=READINGS)
def fd_teacher(evidence: Evidence) -> dict[str, Score]:
    """The distance of the images to the teacher's."""
    generated, teacher = evidence.embedded("images"), evidence.moments("teacher")
    if teacher.count <= teacher.width:
        evidence.note(f"Only {teacher.count} images of the teacher for {teacher.width} features: the distance to it is rough.")
    return {"fd_teacher": frechet(generated, FrechetTo(teacher), evidence.prompts)}
