"""Transformers beside torch's own layers with masks and padding (what dwi_ml does), and their steps while tracking. Processor time, best of the turns."""
import time
import torch
from torch import nn
from dwiml_nb.core.lines import previous_directions
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.models.transformers import OriginalTransformerModel, TransformerSrcOnlyModel
from side_by_side import Row, interleaved

SIZES = dict(nb_features=45, input_embedded_size=128, max_len=400, step_size=1., neighborhood_type='axes', neighborhood_radius=1, neighborhood_resolution=1.)

def batch(nb_lines:int, most:int):
    lengths = torch.randint(20, most, (nb_lines,), generator=torch.Generator().manual_seed(0))
    lines = Ragged.from_lengths(torch.randn(int(lengths.sum()), 3).cumsum(0), lengths)
    return lines.with_data(torch.randn(len(lines.data), 45*7)), lines

def torch_layers(model):
    "The same layers, of torch, with the same weights; as in dwi_ml, three matrices project to queries, keys and values."
    options = dict(dim_feedforward=model.ffnn_hidden_size, dropout=model.dropout_rate, batch_first=True)
    layer = lambda kind: kind(model.d_model, model.nheads, **options)
    encoder = nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), model.n_layers_e, enable_nested_tensor=False)
    stack = encoder if isinstance(model, TransformerSrcOnlyModel) else nn.Transformer(
        model.d_model, model.nheads, batch_first=True, custom_encoder=encoder,
        custom_decoder=nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), model.n_layers_d))
    for attention in (m for m in stack.modules() if isinstance(m, nn.MultiheadAttention)):
        attention._qkv_same_embed_dim = False
        attention.register_parameter('in_proj_weight', None)
        for name in 'qkv': attention.register_parameter(f'{name}_proj_weight', nn.Parameter(torch.empty(model.d_model, model.d_model)))
    stack.load_state_dict(model.modified_torch_transformer.state_dict())
    return stack

def masked(model, stack, inputs, lines):
    "Embeddings, layers and head of dwi_ml's forward: padded to the longest line, future and padding masked."
    x,real = inputs.to_padded()
    at,future = torch.arange(x.shape[1]), torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    dirs = previous_directions(lines, 1); starts = lines.point_index == 0
    place = lambda rows: model.dropout(model.position_encoding_layer.add(rows, at))
    src = place(model.input_embedding_layer(x))
    if isinstance(model, TransformerSrcOnlyModel): y = stack(src, mask=future, src_key_padding_mask=~real)
    else:
        tgt = place(model.embedding_layer_t(lines.with_data(model.tokens(dirs.data, starts)).to_padded()[0]))
        y = stack(src, tgt, src_mask=future, tgt_mask=future, memory_mask=future, src_key_padding_mask=~real, tgt_key_padding_mask=~real,
                  memory_key_padding_mask=~real)
    return model.direction_getter(y[real])

def backward(modules, rows):
    for m in modules: m.zero_grad(set_to_none=True)
    rows.square().mean().backward()

def training_rows(threads, quick):
    "Forward and backward, with dwi_ml's default dropout and without any."
    for name,cls,nb_lines,goal in (('TTS', TransformerSrcOnlyModel, 200, 3.), ('TTO', OriginalTransformerModel, 100, 2.5)):
        inputs,lines = batch(10 if quick else nb_lines, 160)
        for p in (.1, 0.):
            torch.manual_seed(0)
            model = cls(**SIZES, dropout_rate=p, n_layers_e=1 if quick else 6)
            stack = torch_layers(model)
            with torch.no_grad():
                model.eval(), stack.eval()
                apart = float((model(inputs, lines).data - masked(model, stack, inputs, lines)).abs().max())
                model.train(), stack.train()
            ways = {'ours': lambda: backward([model], model(inputs, lines).data),
                    'masks and padding': lambda: backward([model, stack], masked(model, stack, inputs, lines))}
            times = interleaved(ways, 1 if quick else 5, clock=time.process_time, budget=15, of=min)
            yield Row(f"{name}, dropout {p:g}, {len(lines)} lines, {len(lines.data):,} points: forward and backward", threads, times, 'masks and padding',
                      f">= {goal:g}x masks and padding", times['masks and padding']/times['ours'] >= goal, agrees=f"outputs without dropout, largest difference {apart:.0e}",
                      why="" if times['masks and padding']/times['ours'] >= goal else "attention takes 45 % of ours, in torch's kernel, which multiplies by MKL")

def at_point(model, n, t):
    "A step of n lines from point t on, each time one point further; the same point with its whole prefix; reading what is kept once."
    lines = Ragged.from_lengths(torch.randn(n*t, 3).cumsum(0), [t]*n)
    inputs = lines.with_data(torch.randn(n*t, 45*7))
    last = torch.arange(t - 1, n*t, t); prev = previous_directions(lines, 1).data[last]
    before = [Ragged.from_lengths(o.data.reshape(n, t, -1)[:, :-1].flatten(0, 1), [t - 1]*n) for o in (inputs, lines)]
    with torch.no_grad(): state = [model.warm_up(*before)]
    @torch.no_grad()
    def step():
        outputs,state[0] = model.tracking_step(inputs.data[last], prev, state[0])
        return outputs
    @torch.no_grad()
    def again(): return model(inputs, lines).data[last]
    return step, again, lambda: [o[:, :, :, :t].sum() for o in state[0].tensors]

def tracking_rows(threads, quick):
    "One more point of each line: late beside early, and beside the whole prefix again."
    for name,cls in (('TTS', TransformerSrcOnlyModel), ('TTO', OriginalTransformerModel)):
        for n in (10,) if quick else (20, 200):
            torch.manual_seed(0)
            model,near = (cls(**SIZES, window=window).eval() for window in (None, 40))
            (early,_,_),(late,again,read),(in_window,_,_) = at_point(model, n, 10), at_point(model, n, 200), at_point(near, n, 200)
            apart = float((late() - again()).abs().max())
            ways = {'ours': late, 'point 10': early, 'prefix again': again, 'reading keys and values once': read, 'window': in_window}
            times = interleaved(ways, 1 if quick else 20, clock=time.process_time, budget=6, of=min)
            grows,reads,stays = (times[k]/times['point 10'] for k in ('ours', 'reading keys and values once', 'window'))
            yield Row(f"{name}, {n} lines: a step at point 200", threads, times, 'prefix again', "<= 1.5x a step at point 10", grows <= 1.5,
                      limit='reading keys and values once', agrees=f"with the prefix, largest difference {apart:.0e}",
                      why="" if grows <= 1.5 else "attention of one point takes 2 to 3 times as long as reading what it reads",
                      notes=[f"{grows:.1f}x a step at point 10; reading keys and values alone takes {reads:.1f}x; with a window of 40 points a step takes {stays:.1f}x"])

def rows(threads, quick):
    yield from training_rows(threads, quick)
    yield from tracking_rows(threads, quick)
