"""Mixtures of autoencoders: DAMIC and its ablations, k-DAE, MIXAE, and a gate without experts."""

from __future__ import annotations

from dataclasses import replace

from distclust.mixture.method import Method
from distclust.mixture.rows.common import INITIALISE, adam, pretrain
from distclust.mixture.settings import ModelSettings, Phase

DAMIC_PAPER = (
    "Chazan, Gannot & Goldberger 2019, Deep clustering based on a mixture of autoencoders, arXiv 1812.06535"
)
KDAE_PAPER = "Opochinsky, Chazan, Gannot & Goldberger 2020, K-autoencoders deep clustering, ICASSP"
MIXAE_PAPER = (
    "Zhang, Sun, Eriksson & Balzano 2017, Deep unsupervised clustering using mixture of autoencoders"
)


def _experts(epochs: int) -> Phase:
    return Phase(
        name="experts",
        epochs=epochs,
        trains=("experts",),
        terms=(("pseudo_energy", 1.0),),
        optimizer=adam(1e-3),
    )


def _gate(epochs: int, *noise: str) -> Phase:
    return Phase(
        name="gate",
        epochs=epochs,
        trains=("gate",),
        terms=(("pseudo_cross_entropy", 1.0),),
        noise=noise,
        optimizer=adam(1e-3),
    )


_JOINT = Phase(
    name="joint", epochs=50, trains=("experts", "gate"), terms=(("lse", 1.0),), optimizer=adam(1e-3)
)

DAMIC = Method(
    name="damic",
    paper=DAMIC_PAPER,
    summary="a mixture of autoencoders: K experts reconstruct, a gate network says which is asked",
    energy="experts",
    gate="network",
    aggregator="LSE",
    readout="gate",
    reconstruction="inside E",
    # the paper's layer sizes are not known to us; these are a choice, with the code of 10 of its authors'
    # k-DAE
    settings=ModelSettings(norm="layer", tau=1.0, experts="autoencoder"),
    phases=(pretrain(50, adam(1e-3)), INITIALISE, _experts(50), _gate(50), _JOINT),
)

DAMIC_PRETRAINING = replace(
    DAMIC,
    name="damic-pretraining",
    summary="DAMIC's ablation: the four phases before the joint one, and no joint training",
    aggregator="NONE",
    phases=DAMIC.phases[:-1],
)

DAMIC_JOINT = replace(
    DAMIC,
    name="damic-joint",
    summary="DAMIC's ablation: joint training alone, from random weights",
    phases=(_JOINT,),
)

DAMIC_TOPM = replace(
    DAMIC,
    name="damic-topm",
    paper=DAMIC_PAPER + "; leaving experts out is ours",
    summary="DAMIC that asks only the experts of a gate probability above 0.01: another, larger objective",
    settings=replace(DAMIC.settings, expert_threshold=0.01),
)

KDAE = Method(
    name="k-dae",
    paper=KDAE_PAPER,
    summary="K autoencoders; each row belongs to the one that reconstructs it best, and trains that one",
    energy="experts",
    gate="hard",
    aggregator="MIN",
    readout="energy",
    reconstruction="inside E",
    settings=DAMIC.settings,
    phases=(
        pretrain(50, adam(1e-3)),
        INITIALISE,
        _experts(50),
        Phase(name="joint", epochs=50, trains=("experts",), terms=(("min", 1.0),), optimizer=adam(1e-3)),
    ),
)

MIXAE = Method(
    name="mixae",
    paper=MIXAE_PAPER,
    summary="K autoencoders and a gate on their codes, jointly from the start; entropies keep all clusters",
    energy="experts",
    gate="expert_codes",
    aggregator="EXP",
    readout="gate",
    reconstruction="inside E",
    regulariser="sample entropy, minus batch entropy",
    settings=ModelSettings(norm="layer", gate_hidden=(64,)),
    phases=(
        Phase(
            name="joint",
            epochs=100,
            trains=("experts", "gate"),
            # the weights are a choice: energies are sums over features, entropies are below log K
            terms=(("exp", 1.0), ("sample_entropy", 1.0), ("batch_entropy", 100.0)),
            optimizer=adam(1e-3),
        ),
    ),
)

_TEXT_PAPER = DAMIC_PAPER + "; settings for text are ours"

DAMIC_TEXT = Method(
    name="damic-text",
    paper=_TEXT_PAPER,
    summary="DAMIC for text: unit codes, vectors as experts, gate dropout, clean teacher, measured tau",
    energy="experts",
    gate="network",
    aggregator="LSE",
    readout="gate",
    reconstruction="inside E",
    settings=ModelSettings(
        input_dropout=0.2, unit_codes=True, experts="constant", gate_dropout=0.5, tau_spread=0.5
    ),
    phases=(
        pretrain(10, adam(1e-3)),
        INITIALISE,
        # constant experts have their optimum in closed form, so no epoch is needed
        Phase(name="experts", epochs=0, begin=("expert_means",)),
        _gate(5, "gate"),
        Phase(
            name="joint",
            epochs=12,
            trains=("experts", "gate"),
            begin=("temperature",),
            terms=(("lse_clean_teacher", 1.0),),
            noise=("gate",),
            optimizer=adam(1e-3),
        ),
    ),
)

DAMIC_CODES = replace(
    DAMIC_TEXT,
    name="damic-codes",
    summary="DAMIC for text with small autoencoders on the unit codes as experts; the gate reads the words",
    settings=replace(
        DAMIC_TEXT.settings,
        experts="autoencoder",
        expert_space="codes",
        expert_hidden=(32,),
        expert_code_size=8,
    ),
    phases=(
        *DAMIC_TEXT.phases[:2],
        _experts(5),
        *DAMIC_TEXT.phases[3:],
    ),
)

DAMIC_LOWRANK = replace(
    DAMIC_TEXT,
    name="damic-lowrank",
    summary="DAMIC for text with an affine subspace of the words as each expert",
    settings=replace(DAMIC_TEXT.settings, experts="low_rank", expert_code_size=5),
    phases=(
        *DAMIC_TEXT.phases[:2],
        # the vectors start at their means, then the directions are found
        replace(_experts(5), begin=("expert_means",)),
        *DAMIC_TEXT.phases[3:],
    ),
)

DAMIC_USAGE = replace(
    DAMIC_TEXT,
    name="damic-usage",
    paper=DAMIC_PAPER + "; the usage prior of CM (Boubekki et al. 2021) on it is ours",
    summary="DAMIC for text with CM's prior for equal usage; for collections whose topics are about equal",
    regulariser="Dirichlet usage prior",
    phases=(
        *DAMIC_TEXT.phases[:-1],
        # in units of tau a row: the likelihood is tau times nats, and tau is some tens for text
        replace(DAMIC_TEXT.phases[-1], terms=(("lse_clean_teacher", 1.0), ("usage_prior", 1.0))),
    ),
)

DAMIC_SHARP = replace(
    DAMIC_TEXT,
    name="damic-sharp",
    paper=DAMIC_PAPER + "; DEC's sharpened target (Xie, Girshick & Farhadi 2016) as its teacher is ours",
    summary="DAMIC for text that teaches its gate w^2 / f: self-training with the experts as evidence",
    target="w^2 / f, of the undisturbed row",
    # the larger tau, the less the experts say; without them it is the row self-training
    settings=replace(DAMIC_TEXT.settings, sharpen=2.0, balance=1.0, tau_spread=15.0),
)

DAMIC_CONSOLIDATED = replace(
    DAMIC_TEXT,
    name="damic-consolidated",
    paper=DAMIC_PAPER + "; the last phase, on DEC's target (Xie, Girshick & Farhadi 2016), is ours",
    summary="DAMIC for text, and then the gate teaches itself w^2 / f, with the trained experts as evidence",
    target="w^2 / f, of the undisturbed row",
    phases=(
        *DAMIC_TEXT.phases,
        Phase(
            name="consolidate",
            epochs=12,
            trains=("gate",),
            begin=("temperature",),
            terms=(("target_responsibility", 1.0),),
            noise=("gate",),
            # ten spreads of the energies: the experts still speak, and clusters may merge
            tau_factor=20.0,
            optimizer=adam(1e-3),
        ),
    ),
)

DAMIC_ANNEALED = replace(
    DAMIC_TEXT,
    name="damic-annealed",
    paper=DAMIC_PAPER + "; annealing its temperature is ours",
    summary="DAMIC for text whose temperature falls from eight times its value to it",
    phases=(*DAMIC_TEXT.phases[:-1], replace(DAMIC_TEXT.phases[-1], anneal="tau")),
)

SELF_TRAINING = Method(
    name="self-training",
    paper="Ours, from DEC's target (Xie, Girshick & Farhadi 2016): what a mixture has to beat",
    summary="no experts: the gate learns its own sharpened answers to undisturbed rows from disturbed ones",
    energy="none",
    gate="network",
    aggregator="TARGET",
    readout="gate",
    target="p^2 / f, of the undisturbed row",
    settings=ModelSettings(input_dropout=0.2, unit_codes=True, gate_dropout=0.5),
    phases=(
        pretrain(10, adam(1e-3)),
        INITIALISE,
        _gate(5, "gate"),
        Phase(
            name="joint",
            epochs=12,
            trains=("gate",),
            terms=(("target_clean", 1.0),),
            noise=("gate",),
            optimizer=adam(1e-3),
        ),
    ),
)

_LSA_START = Phase(
    name="initialise", epochs=0, begin=("singular_directions", "initialise_clusters", "code_radius")
)
"""k-means on the rows' singular directions, in place of a pretrained autoencoder's codes."""


def _from_lsa(row: Method, name: str, summary: str) -> Method:
    """The row without an autoencoder: gate and experts read rows, so only the start asks for codes."""
    return replace(
        row,
        name=name,
        paper=f"{row.paper}; the start from latent semantic analysis is ours",
        summary=summary,
        network="directions",
        settings=replace(row.settings, code_size=50, input_dropout=0.0),
        phases=(_LSA_START, *row.phases[2:]),
    )


DAMIC_LSA = _from_lsa(
    DAMIC_TEXT,
    "damic-lsa",
    "DAMIC for text that starts from k-means on singular directions: no autoencoder is trained",
)

DAMIC_LSA_CONSOLIDATED = _from_lsa(
    DAMIC_CONSOLIDATED,
    "damic-lsa-consolidated",
    "DAMIC from singular directions, and then the gate teaches itself w^2 / f with the experts as evidence",
)

SELF_TRAINING_LSA = _from_lsa(
    SELF_TRAINING,
    "self-training-lsa",
    "self-training without experts that starts from k-means on singular directions",
)

ROWS = (
    DAMIC,
    DAMIC_PRETRAINING,
    DAMIC_JOINT,
    DAMIC_TOPM,
    KDAE,
    MIXAE,
    DAMIC_TEXT,
    DAMIC_CODES,
    DAMIC_LOWRANK,
    DAMIC_USAGE,
    DAMIC_SHARP,
    DAMIC_CONSOLIDATED,
    DAMIC_ANNEALED,
    SELF_TRAINING,
    DAMIC_LSA,
    DAMIC_LSA_CONSOLIDATED,
    SELF_TRAINING_LSA,
)
