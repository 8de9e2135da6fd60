"""The 32 native layers. A name spells its parts: D dual, S synapse, R recurrent; then the family; then EMA.

`LI` gives the membrane; `LIB` fires above one threshold; `LIT` has one for each sign; `LITS` a scale for each sign too.
The equations of each are in its docstring, made from its parts: `help(tt.snn.DSRLITS)`.
"""

from tracetorch.snn.composed import Composed


class LI(Composed, family="LI"):
    """Leaky integrator; the output is the membrane. For read-outs:"""


class DLI(Composed, family="LI", parts="D"):
    """Dual leaky integrator: a membrane for each sign of the input:"""


class SLI(Composed, family="LI", parts="S"):
    """Leaky integrator of a synaptic trace:"""


class DSLI(Composed, family="LI", parts="DS"):
    """Dual leaky integrator of a synaptic trace:"""


class LIEMA(Composed, family="LI", ema=True):
    """Exponential moving average of the input:"""


class DLIEMA(Composed, family="LI", parts="D", ema=True):
    """Dual exponential moving average: one for each sign of the input:"""


class SLIEMA(Composed, family="LI", parts="S", ema=True):
    """Exponential moving average of a synaptic trace:"""


class DSLIEMA(Composed, family="LI", parts="DS", ema=True):
    """Dual exponential moving average of a synaptic trace:"""


class LIB(Composed, family="LIB"):
    """Leaky integrator with one threshold, reset by subtraction in the same step, gradient attached:"""


class DLIB(Composed, family="LIB", parts="D"):
    """Dual `LIB`: a membrane for each sign, half of the reset from each:"""


class SLIB(Composed, family="LIB", parts="S"):
    """`LIB` on a synaptic trace:"""


class RLIB(Composed, family="LIB", parts="R"):
    """`LIB` that takes a trace of its own output:"""


class DSLIB(Composed, family="LIB", parts="DS"):
    """Dual `LIB` on a synaptic trace:"""


class DRLIB(Composed, family="LIB", parts="DR"):
    """Dual `LIB` that takes a trace of its own output:"""


class SRLIB(Composed, family="LIB", parts="SR"):
    """`LIB` on a synaptic trace that takes a trace of its own output:"""


class DSRLIB(Composed, family="LIB", parts="DSR"):
    """Dual `LIB` on a synaptic trace that takes a trace of its own output:"""


class LIT(Composed, family="LIT"):
    """Leaky integrator with a positive and a negative threshold: outputs 1, 0 and -1 when quantized:"""


class DLIT(Composed, family="LIT", parts="D"):
    """Dual `LIT`: a membrane for each sign, half of each reset from each:"""


class SLIT(Composed, family="LIT", parts="S"):
    """`LIT` on a synaptic trace:"""


class RLIT(Composed, family="LIT", parts="R"):
    """`LIT` that takes a trace of its own output:"""


class DSLIT(Composed, family="LIT", parts="DS"):
    """Dual `LIT` on a synaptic trace:"""


class DRLIT(Composed, family="LIT", parts="DR"):
    """Dual `LIT` that takes a trace of its own output:"""


class SRLIT(Composed, family="LIT", parts="SR"):
    """`LIT` on a synaptic trace that takes a trace of its own output:"""


class DSRLIT(Composed, family="LIT", parts="DSR"):
    """Dual `LIT` on a synaptic trace that takes a trace of its own output:"""


class LITS(Composed, family="LITS"):
    """`LIT` with a scale for each sign of its output:"""


class DLITS(Composed, family="LITS", parts="D"):
    """Dual `LITS`: a membrane for each sign, half of each reset from each:"""


class SLITS(Composed, family="LITS", parts="S"):
    """`LITS` on a synaptic trace:"""


class RLITS(Composed, family="LITS", parts="R"):
    """`LITS` that takes a trace of its own output:"""


class DSLITS(Composed, family="LITS", parts="DS"):
    """Dual `LITS` on a synaptic trace:"""


class DRLITS(Composed, family="LITS", parts="DR"):
    """Dual `LITS` that takes a trace of its own output:"""


class SRLITS(Composed, family="LITS", parts="SR"):
    """`LITS` on a synaptic trace that takes a trace of its own output:"""


class DSRLITS(Composed, family="LITS", parts="DSR"):
    """Dual `LITS` on a synaptic trace that takes a trace of its own output:"""


LAYERS = (
    *(LI, DLI, SLI, DSLI, LIEMA, DLIEMA, SLIEMA, DSLIEMA),
    *(LIB, DLIB, SLIB, RLIB, DSLIB, DRLIB, SRLIB, DSRLIB),
    *(LIT, DLIT, SLIT, RLIT, DSLIT, DRLIT, SRLIT, DSRLIT),
    *(LITS, DLITS, SLITS, RLITS, DSLITS, DRLITS, SRLITS, DSRLITS),
)
