"Values of a wrong kind for each option of each model and getter: built, or one sentence of ours, never a bare error from below."
import numpy as np
import pytest
import torch

from dwiml_nb.cli.common import said_by_us
from dwiml_nb.core.options import options_of
from dwiml_nb.directions.base import DIRECTION_GETTERS
from dwiml_nb.models.autoencoder import ModelAE
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcAndTgtModel, TransformerSrcOnlyModel

WRONG = ["x", [1.], ["a"], {}, {"a": 1}, {"key": 3}, (), None, float("nan"), object(), np.ones(2), torch.ones(2), 10**30, -1, [[1]], [None], [0]]
CNN = dict(input_embedding_key="cnn_embedding", nb_cnn_filters=[2], kernel_size=[2], neighborhood_type="grid", neighborhood_radius=1)
PREVIOUS = dict(nb_previous_dirs=1, prev_dirs_embedding_key="nn_embedding", prev_dirs_embedded_size=3)
TRANSFORMER = dict(nb_features=4, input_embedded_size=8, nheads=2, n_layers_e=1, max_len=10)
MODELS = [(Learn2TrackModel, dict(nb_features=2, rnn_layer_sizes=[4], **CNN, **PREVIOUS)), (TransformerSrcOnlyModel, TRANSFORMER),
          (TransformerSrcAndTgtModel, dict(TRANSFORMER, target_embedded_size=4)), (OriginalTransformerModel, dict(TRANSFORMER, n_layers_d=1)), (ModelAE, {})]


def bare(make):
    "What was raised below; None: it was made, or refused in a sentence."
    try: make()
    except Exception as e: return None if said_by_us(e) else f"{type(e).__name__}: {e}"


@pytest.mark.parametrize("cls, base", MODELS, ids=lambda o: getattr(o, "__name__", ""))
def test_options_of_models(cls, base):
    names = [name for name in options_of(cls) if cls is not ModelAE or name != "experiment_name"]
    found = {(name, repr(v)): said for name in names for v in WRONG if (said := bare(lambda: cls(**{**base, name: v})))}
    assert not found and len(names) > 4


@pytest.mark.parametrize("key", ["cosine-regression", "sphere-classification", "gaussian-mixture", "fisher-von-mises"])
def test_options_of_getters(key):
    names = [name for name in options_of(DIRECTION_GETTERS[key]) if name != "input_size"]
    assert not {(name, repr(v)): said for name in names for v in WRONG
                if (said := bare(lambda: Learn2TrackModel(4, rnn_layer_sizes=[4], dg_key=key, dg_args={name: v})))}


def test_the_sentence():
    with pytest.raises(ValueError, match=r"Learn2TrackModel: neighborhood_radius is a whole number, found \[1.0\]"): Learn2TrackModel(4, neighborhood_type="axes", neighborhood_radius=[1.])
    class Mine(Learn2TrackModel):
        def __init__(self, nb_features:int, dropout:int=0, **parts): super().__init__(nb_features, dropout=float(dropout), **parts)
    assert Mine(4, dropout="0.1", rnn_layer_sizes=[4]).embedding_dropout.p == .1          # a class of one's own says what it takes
