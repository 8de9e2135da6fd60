"""The conformance suite: whether a simulator computes the neuron that it is asked for, judged by the oracle.

`run(subjects=["tracetorch", "sinabs", "snntorch"])` grades subjects, ours or anybody's: an object with the three calls
of `Subject`, or a command, `ChildSubject(["python", "mine.py"])`. No framework is imported before its subject is named.
"""

from tracetorch.conformance.bisection import Parting, bisect
from tracetorch.conformance.cases import Case, CaseError
from tracetorch.conformance.catalogue import catalogue, select
from tracetorch.conformance.child import ChildSubject
from tracetorch.conformance.conversions import FRAMEWORKS, Conversions, Converted, conversions
from tracetorch.conformance.deviations import DEVIATIONS, Deviation
from tracetorch.conformance.protocol import Subject, SubjectError, Unsupported, check_description, record
from tracetorch.conformance.requirements import REQUIREMENTS, Requirement
from tracetorch.conformance.runner import CaseResult, Results, run
from tracetorch.conformance.server import serve
from tracetorch.conformance.subjects import SUBJECTS, subject
from tracetorch.conformance.verdicts import VERDICTS, Aspect

__all__ = [
    "DEVIATIONS",
    "FRAMEWORKS",
    "REQUIREMENTS",
    "SUBJECTS",
    "VERDICTS",
    "Aspect",
    "Case",
    "CaseError",
    "CaseResult",
    "ChildSubject",
    "Conversions",
    "Converted",
    "Deviation",
    "Parting",
    "Requirement",
    "Results",
    "Subject",
    "SubjectError",
    "Unsupported",
    "bisect",
    "catalogue",
    "check_description",
    "conversions",
    "record",
    "run",
    "select",
    "serve",
    "subject",
]
