"""The quality studies work: a few steps of each kind, resumed where they stopped, and the pages of their results."""

import json
import re
from collections import OrderedDict

import pandas
import peft
import pytest
import torch
from scipy.optimize import nnls
from torch import nn

import quality
from studies.captured import shares
from studies.limits import cut
from studies.methods import CUTS, METHODS
from studies.page import GONE, arrivals, at_one_rate, below, chosen_of, gaps, read_study, values_of, write_quality
from studies.peers import AltLoRAPlus, LoRAMuon, LoRAPro, LoRARITE, PSILoRA, ScaLoRA, best_scales, low_rank_sum
from studies.tasks import Factorisation
from studies.training import best_of_rank, changes, compare


@pytest.fixture(autouse=True)
def threads_as_they_were():
    """A study takes all cores, and bitwise comparisons of later tests would be of other sums."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def own_rate(results, method):
    return next(record["lr"] for record in results if record["method"] == method and record["seed"] == 1)


def run(name, folder):
    file = folder / f"{name}.jsonl"
    quality.run_study(quality.quick(quality.STUDIES[name]), file, workers=1)
    return file, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", ["factorisation", pytest.param("classification", marks=pytest.mark.study)])
def test_a_study_and_its_page(name, tmp_path):
    _, results = run(name, tmp_path / "quality")
    # Three methods, two rates each, one more seed at the better one.
    assert len(results) == 9
    assert {record["method"] for record in results} == {"full", "LoFT", "LoRA"}
    score = quality.STUDIES[name].task.score
    for method in ("full", "LoFT", "LoRA"):
        own = [record for record in results if record["method"] == method]
        (again,) = (record for record in own if record["seed"] == 1)
        assert again["lr"] == min((record for record in own if record["seed"] == 0), key=lambda r: r[score])["lr"]
    assert all(record["commit"] and record["seconds"] > 0 and len(record["training_losses"]) == 3 for record in results)

    write_quality(tmp_path / "quality", tmp_path / "pages")
    assert f"(quality/{name}.md)" in (tmp_path / "pages" / "quality.md").read_text()
    page = (tmp_path / "pages" / "quality" / f"{name}.md").read_text()
    chosen = [r for r in results if r["method"] == "LoFT" and r["lr"] == own_rate(results, "LoFT")]
    shown = "loss" if name == "factorisation" else "test_loss"
    assert f"| {sum(r[shown] for r in chosen) / len(chosen):.3f} ± " in page


def test_tables_of_a_study():
    """Of two ranks, two rates and two seeds, every number worked out by hand."""

    def training(method, rank, lr, seed, score, loss):
        return {"method": method, "rank": rank, "lr": lr, "seed": seed, "validation_loss": score, "test_loss": loss}

    rows = [
        training("full", 0, lr, seed, score, 0.2)
        for lr, seed, score in ((1e-4, 0, 2.0), (3e-4, 0, 1.0), (3e-4, 1, 1.0))
    ]
    rows += [training("full", 0, 1e-3, 0, 3.0, 0.2)]
    for rank, loft, lora in ((1, 0.5, 0.6), (2, 0.3, 0.6)):
        rows += [training("LoFT", rank, lr, 0, score, loft) for lr, score in ((1e-4, 2.0), (3e-4, 1.0))]
        rows += [training("LoFT", rank, 3e-4, 1, 9.0, loft + 0.1)]  # a better seed 1 elsewhere decides nothing
        rows += [training("LoRA", rank, lr, 0, score, lora) for lr, score in ((1e-3, 1.0), (3e-3, 2.0))]
        rows += [training("LoRA", rank, 1e-3, 1, 1.0, lora + 0.2)]
    chosen = chosen_of(pandas.DataFrame(rows))
    assert set(zip(chosen["method"], chosen["lr"], strict=True)) == {("full", 3e-4), ("LoFT", 3e-4), ("LoRA", 1e-3)}
    # Half of the interval of two values d apart: 12.7062 d / 2, which is Student's t of one degree of freedom.
    assert values_of(chosen, "test_loss", ["LoFT", "full"]) == {
        "LoFT": {1: "0.550 ± 0.635 *", 2: "0.350 ± 0.635 *"},
        "full": {0: "0.200 ± 0.000"},
    }
    assert gaps(chosen, "test_loss") == {"LoFT": {1: "30%", 2: "70%"}}
    assert below(chosen, "test_loss", "LoRA") == {"LoFT": {1: "0.150 ± 0.635", 2: "0.350 ± 0.635"}}
    assert at_one_rate(pandas.DataFrame(rows), "test_loss") == {1: "0.550 ± 0.635", 2: "0.350 ± 0.635"}


def test_when_a_method_comes_to_full_fine_tunings_last_loss():
    """Two seeds of four steps each: one comes there halfway between looks, one never does."""

    def training(method, rank, seed, looks, last):
        held_out = {"1": looks[0], "2": looks[1], "3": looks[2]}
        return {"method": method, "rank": rank, "seed": seed, "steps": 4, "held_out": held_out, "test_loss": last}

    rows = [training("full", 0, seed, (4.0, 3.0, 2.5), 2.0) for seed in range(2)]
    rows += [training("LoFT", 8, 0, (3.0, 2.5, 1.5), 1.0), training("LoFT", 8, 1, (3.0, 2.5, 2.2), 2.1)]
    rows += [training("LoRA", 8, seed, (5.0, 4.5, 4.2), 3.5) for seed in range(2)]
    table = arrivals(pandas.DataFrame(rows), "test_loss")
    # LoFT: 2.5 steps of 4. Full is never at 1.0, and at 2.1 after 3.8 steps; at LoRA's 3.5 it is after 1.5.
    loft, lora = (re.sub(" +", " ", line) for line in table.splitlines()[2:])
    assert loft == "| LoFT | r = 8 | 62%, 1 of 2 seeds | 95%, 1 of 2 seeds |"
    assert lora == "| LoRA | r = 8 | never | 38% |"


@pytest.mark.parametrize("file", sorted(quality.RESULTS.rglob("*.findings.md")), ids=lambda file: file.name)
def test_findings_are_of_short_sentences(file):
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("|"))
    for part in re.split(r"\n\n|\n- |\n#+ ", text):
        for sentence in re.split(r"(?<=[.?!:]) ", re.sub(r"[*\s]+", " ", part)):
            assert len(re.findall(r"\S*\w\S*", sentence)) <= 25, sentence


@pytest.mark.parametrize("file", sorted((quality.RESULTS / "quality").glob("*.jsonl")), ids=lambda file: file.stem)
def test_a_page_says_whose_code_is_gone(file):
    methods = set(read_study(file)["method"])
    page = (quality.ROOT / "docs" / "results" / "quality" / f"{file.stem}.md").read_text()
    for mark, commit in GONE.items():
        assert (f"`{mark}` at `{commit}`" in page) == any(mark in method for method in methods)
    assert {method for method in methods if not any(mark in method for mark in GONE)} == methods & set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reviews", "--methods", "LoRA", "PiSSA", "LoRA+"], "reviews has no columns LoRA+, PiSSA"),
        (["page", "--methods", "LoRA"], "page has no columns to choose"),
    ],
)
def test_columns_that_a_study_has_not(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality.py", *arguments])
    with pytest.raises(SystemExit):
        quality.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", quality.STUDIES)
def test_no_cell_of_a_study_is_named_twice(name):
    """Two workers would train it at the same time."""
    cells = [(m, rank) for methods, ranks in quality.STUDIES[name].columns for rank in ranks for m in methods]
    assert len(cells) == len(set(cells))


def test_some_columns(tmp_path, monkeypatch):
    arguments = ["quality.py", "factorisation", "--quick", "--results", str(tmp_path), "--methods", "LoRA"]
    monkeypatch.setattr("sys.argv", arguments)
    quality.main()
    assert {record["method"] for record in quality.records(tmp_path / "factorisation.jsonl")} == {"LoRA"}


def test_a_study_goes_on_where_it_stopped(tmp_path):
    file, results = run("factorisation", tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]))
    _, resumed = run("factorisation", tmp_path)
    assert [r["training_losses"] for r in resumed] == [r["training_losses"] for r in results]
    assert resumed[:7] == results[:7], "done anew"


def test_nearest_change_of_a_rank():
    torch.manual_seed(0)
    reference = {"w": torch.randn(6, 4)}
    assert compare(reference, reference)["distance"] == 0
    near = compare(best_of_rank(reference, 2), reference)
    tail = torch.linalg.svdvals(reference["w"])[2:].norm() / reference["w"].norm()
    assert near["distance"] == pytest.approx(float(tail), abs=1e-6)  # Eckart and Young
    assert near["cosine"] == pytest.approx((1 - float(tail) ** 2) ** 0.5, abs=1e-6)


def test_shares_of_a_gradient():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    inside = torch.randn(6, 2) @ a + b @ torch.randn(2, 8)
    assert shares(inside, a, b)["both"] == pytest.approx(1, abs=1e-5)  # float32
    left, right = torch.linalg.qr(torch.randn(6, 6))[0], torch.linalg.qr(torch.randn(8, 6))[0]
    outside = left[:, :4].mul(torch.tensor([4.0, 3, 2, 1])) @ right[:, :4].T
    first = shares(outside, right[:, [0, 3]].T, torch.zeros(6, 2))
    # Squares: 16 of 30 and 1 of 30 in reach; the best two directions have 25.
    assert first == pytest.approx({"B": 17 / 30, "A": 0, "both": 17 / 30, "best B": 25 / 30}, abs=1e-5)
    assert shares(outside, right[:, [0, 3]].T, left[:, [1, 3]])["both"] == pytest.approx(26 / 30, abs=1e-5)


@pytest.mark.study
def test_what_is_captured(tmp_path, monkeypatch):
    task = quality.quick(quality.STUDIES["classification"]).task
    file = tmp_path / "quality" / "captured.jsonl"
    monkeypatch.setattr(quality, "CAPTURED", ((quality.LOFT, 2),))
    quality.run_captured(task, file)
    monkeypatch.setattr(quality, "CAPTURED", ((quality.LOFT, 2), (quality.GRADIENT, 2)))
    quality.run_captured(task, file)  # goes on with what is missing
    lines = quality.records(file)
    assert [(line["method"], line["step"]) for line in lines[:: len(lines) // 4]] == [
        (method, step) for method in (quality.LOFT, quality.GRADIENT) for step in (0, 1)
    ]
    for line in lines:
        share = line["share"]
        at_zero = line["method"] == quality.LOFT and line["step"] == 0
        assert (share["A"] == 0) == at_zero, "B is zero at PEFT's start, and not after a step"
        assert 0 < share["B"] <= share["both"] + 1e-12 <= 1  # float64; they are the same where B is zero
        assert share["B"] <= share["best B"] <= 1
    write_quality(tmp_path / "quality", tmp_path / "pages")
    assert f"{lines[0]['share']['both']:.3f}" in (tmp_path / "pages" / "quality" / "captured.md").read_text()


@pytest.mark.parametrize(
    ("method", "length", "left_in"),
    [(quality.GRADIENT, None, False), (quality.START, 0.2, False), (f"{quality.START} left in", 0.2, True)],
)
def test_where_a_start_from_gradients_is(method, length, left_in):
    task = Factorisation(m=12, n=9, rank=4)  # LoRA-GA takes twice as many directions as the adapters have
    model = task.model(0)
    weight = model[0].weight.detach().clone()
    prepared = METHODS[method].prepare(task, model, rank=2, lr=1e-3, seed=0)
    (layer,) = (module for module in prepared.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    adapter = layer.get_delta_weight("default").detach()
    assert float(adapter.norm()) == pytest.approx(length, rel=1e-5) if length else float(adapter.norm()) > 1e-3
    moved = layer.get_base_layer().weight.detach() - weight
    torch.testing.assert_close(moved, torch.zeros_like(adapter) if left_in else -adapter)  # float32 throughout


def cut_run(method, rank, lr=0.1, steps=4):
    """A matrix in float64 after some steps by one of CUTS, and the changes at each; gradients that depend on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False)).double()
    weight, start = model[0].weight, model[0].weight.detach().clone()
    goal = torch.randn(6, 5, dtype=torch.float64)
    (optimizer,) = METHODS[method].build(model, {"params": []}, lr, rank)
    changes = []
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - goal).square().sum().backward()
        optimizer.step()
        changes.append(weight.detach() - start)
    return changes, optimizer


@pytest.mark.parametrize("method", CUTS)
def test_a_cut_to_the_full_rank_is_adamw(method):
    for ours, adamw in zip(cut_run(method, 5)[0], cut_run("full, adapted matrices alone", 0)[0], strict=True):
        torch.testing.assert_close(ours, adamw)


@pytest.mark.parametrize("method", CUTS)
def test_what_is_cut(method):
    changes, optimizer = cut_run(method, 1)
    steps = [after - before for before, after in zip([torch.zeros(6, 5).double(), *changes], changes, strict=False)]
    assert max(torch.linalg.svdvals(each)[1] for each in (steps if "each step" in method else changes)) < 1e-12
    rank_of_change = int((torch.linalg.svdvals(changes[-1]) > 1e-9).sum())
    assert rank_of_change == (4 if "each step" in method else 1)
    # A remainder of Adam's first step, all of whose numbers are of size lr, is not small.
    remainder = float(optimizer._matrices[0].whole.norm() - ("change cut" in method) * changes[-1].norm())
    assert (remainder > 1e-3) == ("remainder kept" in method)


def test_a_cut_is_the_nearest_of_its_rank():
    torch.manual_seed(0)
    matrix = torch.randn(6, 5).double() @ torch.diag(10.0 ** -torch.arange(5)).double()  # fast to converge
    nearest, right = cut(matrix, torch.randn(5, 2).double())
    torch.testing.assert_close(cut(matrix, right)[0], best_of_rank({"w": matrix}, 2)["w"], rtol=0, atol=1e-8)
    assert torch.linalg.matrix_rank(nearest) == 2


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].adapter is not None])
def test_no_parameter_is_trained_twice(method):
    """PEFT's LoRA-FA takes the head along, which then moved at two rates."""
    layers = [("body", nn.Linear(7, 9)), ("classifier", nn.Linear(9, 5))]
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["classifier"])
    model = peft.get_peft_model(nn.Sequential(OrderedDict(layers)), config)
    head = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    group = {"params": head, "lr": 1e-2}
    optimizers = METHODS[method].build(model, group, 1e-3, 2, **METHODS[method].switches)
    moved = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(moved) == len({id(p) for p in moved})
    assert {id(p) for p in moved if p.requires_grad} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(head) == 2


def a_pair(rank, m=6, n=8):
    """A layer in float64 whose ``B`` is not zero, and its adapter's factors and their scaling."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(n, m, bias=False)), config).double()
    layer = model.base_model.model[0]
    return model, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def backward(gradient, a, b, scaling):
    a.grad, b.grad = scaling * b.detach().T @ gradient, scaling * gradient @ a.detach().T


@pytest.mark.parametrize("rank", [2, 6])
def test_lora_pro_takes_adams_step_as_far_as_its_factors_reach(rank):
    lr = 0.1
    model, a, b, scaling = a_pair(rank)
    optimizer = LoRAPro(model, lr)
    first = second = torch.zeros(6, 8, dtype=torch.float64)
    for step in (1, 2, 3):
        gradient = torch.randn(6, 8, dtype=torch.float64)
        left, right = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a  # projections onto what is in reach
        reached = left @ gradient + (torch.eye(6) - left) @ gradient @ right
        if rank == 6:
            torch.testing.assert_close(reached, gradient)
        first, second = 0.9 * first + 0.1 * reached, 0.999 * second + 0.001 * reached**2
        direction = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        before_a, before_b = a.detach().clone(), b.detach().clone()
        backward(gradient, a, b, scaling)
        optimizer.step()
        move_a, move_b = (before_a - a.detach()) / lr, (before_b - b.detach()) / lr
        within = left @ direction + (torch.eye(6) - left) @ direction @ right
        torch.testing.assert_close(scaling * (before_b @ move_a + move_b @ before_a), within, rtol=0, atol=1e-9)
        # Of all pairs of moves that do this, (move_a + X A, move_b - B X), the nearest to Adam's for LoRA: stationary.
        off_a, off_b = move_a - scaling * before_b.T @ direction, move_b - scaling * direction @ before_a.T
        torch.testing.assert_close(off_a @ before_a.T, before_b.T @ off_b, rtol=0, atol=1e-9)


def test_lora_rite_moves_all_factors_of_one_product_alike():
    products = []
    for other in (torch.eye(2), torch.tensor([[0.3, 5.0], [-2.0, 0.1]])):
        model, a, b, scaling = a_pair(2)
        with torch.no_grad():
            a.copy_(other.double() @ a)
            b.copy_(b @ torch.linalg.inv(other.double()))
        start = (b @ a).detach()
        optimizer = LoRARITE(model, 0.1, max_grad_norm=1.0)
        for _ in range(4):
            backward(torch.randn(6, 8, dtype=torch.float64), a, b, scaling)
            optimizer.step()
        products.append((b @ a).detach())
        assert float((products[-1] - start).norm()) > 0.1
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e3])
def test_lora_rite_is_its_full_size_form(max_grad_norm):
    """Its moments as matrices of the other factor's whole width, (k, l) and (l, l), cut by projections."""
    model, a, b, scaling = a_pair(2)
    optimizer = LoRARITE(model, 0.3, max_grad_norm)
    first, second, escaped = {}, {}, {}
    for step in range(1, 6):
        gradient = torch.randn(6, 8, dtype=torch.float64)
        reached, inverses = {}, {}
        for side, full, other in (("a", gradient.T, b), ("b", gradient, a.T)):
            inverses[side] = torch.linalg.pinv(other.detach())
            reached[side] = scaling * full @ other.detach() @ inverses[side]
        clip = min(1, max_grad_norm / sum(float(part.square().sum()) for part in reached.values()) ** 0.5)
        decay1, decay2 = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in (0.9, 0.999))
        expected = {}
        for side, rows in (("a", a.detach().T), ("b", b.detach())):
            seen, inverse = clip * reached[side], inverses[side]
            onto = torch.linalg.pinv(inverse) @ inverse
            size = len(onto)
            old = second.get(side, torch.zeros(size, size, dtype=torch.float64))
            turned = onto @ old @ onto
            lost = torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(turned)
            escaped[side] = decay2 * (escaped.get(side, 0.0) + max(0.0, float(min(lost.max(), lost.sum()))))
            second[side] = decay2 * turned + (1 - decay2) * seen.T @ seen / len(seen)
            values, vectors = torch.linalg.eigh(second[side])
            normal = seen @ vectors / ((values.clamp_min(0) + escaped[side]).sqrt() + 1e-6) @ vectors.T
            first[side] = decay1 * first.get(side, 0 * seen) @ onto + (1 - decay1) * normal
            expected[side] = rows - 0.3 * first[side] @ inverse.T
        backward(gradient, a, b, scaling)
        optimizer.step()
        # In full size V has eigenvalues of zero, whose inverse root, up to 1e6, is multiplied by rounding of 1e-16.
        torch.testing.assert_close(a.detach().T, expected["a"], rtol=0, atol=1e-8)
        torch.testing.assert_close(b.detach(), expected["b"], rtol=0, atol=1e-8)
    assert escaped["a"] > 0
    assert escaped["b"] > 0


def test_altloras_momentum_is_the_projection_of_a_full_ones():
    model, a, b, scaling = a_pair(2)
    optimizer = AltLoRAPlus(model, lr=0.01)
    full = {"a": torch.zeros(8, 6, dtype=torch.float64), "b": torch.zeros(6, 8, dtype=torch.float64)}
    squares = {"a": 0.0, "b": 0.0}
    for step in range(1, 5):
        gradient = torch.randn(6, 8, dtype=torch.float64)
        before = {"a": a.detach().T.clone(), "b": b.detach().clone()}
        backward(gradient, a, b, scaling)
        optimizer.step()
        for side, seen, other, after in (
            ("a", scaling * gradient.T @ before["b"], before["b"], a.detach().T),
            ("b", scaling * gradient @ before["a"], a.detach().T, b.detach()),  # by the A that has moved
        ):
            inverse = torch.linalg.inv(other.T @ other)
            full[side] = 0.9 * full[side] @ other @ torch.linalg.pinv(other) + 0.1 * seen @ inverse @ other.T
            squares[side] = 0.999 * squares[side] + 0.001 * (seen @ inverse) ** 2
            momentum = full[side] @ torch.linalg.pinv(other).T / (1 - 0.9**step)
            expected = before[side] - 0.01 * momentum / (squares[side] / (1 - 0.999**step)).sqrt()
            # Of a rate of 0.01. Gram matrices are regularised by 1e-6, which is 1e-5 of their smallest eigenvalues.
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-4 * 0.01)


def sign_of(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def inverse_root_of(gram):
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def test_lora_muon_is_its_step_of_the_whole_matrix():
    """The signs of the momentum seen through bases of the factors' columns, moved back into the factors by pinv."""
    model, a, b, scaling = a_pair(2)
    optimizer = LoRAMuon(model, lr=0.3)
    first = {"a": 0.0, "b": 0.0}
    for _ in range(4):
        gradient = torch.randn(6, 8, dtype=torch.float64)
        backward(gradient, a, b, scaling)
        before_a, before_b = a.detach().clone(), b.detach().clone()
        first = {"a": 0.9 * first["a"] + 0.1 * a.grad, "b": 0.9 * first["b"] + 0.1 * b.grad}
        root_of_a, root_of_b = inverse_root_of(before_a @ before_a.T), inverse_root_of(before_b.T @ before_b)
        along_a = sign_of(first["b"] @ root_of_a) @ root_of_a @ before_a
        along_b = before_b @ root_of_b @ sign_of(root_of_b @ first["a"])
        optimizer.step()
        # Gram matrices are regularised by 1e-5 of their norm, which is 1e-4 of their smallest eigenvalues.
        for moved, expected in (
            (scaling * (b.detach() - before_b) @ before_a, -0.15 * along_a),
            (scaling * before_b @ (a.detach() - before_a), -0.15 * along_b),
        ):
            torch.testing.assert_close(moved, expected, rtol=0, atol=1e-3 * 0.15)
            assert float(torch.linalg.matrix_norm(moved, 2)) == pytest.approx(0.15, rel=1e-3)


def test_lora_muon_moves_rescaled_factors_alike():
    products = []
    for scale in (1.0, 30.0):
        model, a, b, scaling = a_pair(2)
        with torch.no_grad():
            a.mul_(scale)
            b.div_(scale)
        optimizer = LoRAMuon(model, lr=0.3)
        for _ in range(4):
            backward(torch.randn(6, 8, dtype=torch.float64), a, b, scaling)
            optimizer.step()
        products.append((b @ a).detach())
    torch.testing.assert_close(*products)


def test_lora_muon_starts_where_b_is_zero():
    model, a, b, scaling = a_pair(2)
    torch.nn.init.zeros_(b)
    before = a.detach().clone()
    optimizer = LoRAMuon(model, lr=0.3)
    gradient = torch.randn(6, 8, dtype=torch.float64)
    backward(gradient, a, b, scaling)
    optimizer.step()
    assert torch.equal(a.detach(), before)
    # Regularised as above.
    assert torch.linalg.svdvals(scaling * (b @ a).detach())[:2].tolist() == pytest.approx([0.15, 0.15], rel=1e-3)
    backward(gradient, a, b, scaling)
    optimizer.step()
    assert a.isfinite().all()
    assert not torch.equal(a.detach(), before)


def test_lora_muon_has_no_direction_beyond_its_gradients():
    model, a, b, scaling = a_pair(2)
    before_a, before_b = a.detach().clone(), b.detach().clone()
    optimizer = LoRAMuon(model, lr=0.3)
    backward(torch.outer(torch.randn(6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)), a, b, scaling)
    optimizer.step()
    for moved in (a.detach() - before_a, b.detach() - before_b):
        assert int(torch.linalg.matrix_rank(moved, rtol=1e-9)) == 1  # far above float64's rounding


def test_a_low_rank_sum_comes_to_the_truncated_svd():
    torch.manual_seed(0)
    down, up, change = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 8), (6, 2), (6, 8)))
    total = {"w": up @ down + change}
    found_down, found_up = low_rank_sum(down, up, change, 1e-12, rounds=300)
    # The third singular value is at most 0.9 of the second, and 0.9**300 is 1e-14.
    values = torch.linalg.svdvals(total["w"])
    assert values[2] < 0.9 * values[1]
    torch.testing.assert_close(found_up @ found_down, best_of_rank(total, 2)["w"], rtol=0, atol=1e-8)


def weighted_least_squares(basis, target, weights, start, proximity):
    """The ``X`` (r, l) nearest to ``target = basis @ X`` with squares weighted by row, and near to ``start``: dense."""
    rows = torch.cat([weights.sqrt()[:, None] * basis, proximity**0.5 * torch.eye(basis.shape[1])])
    aims = torch.cat([weights.sqrt()[:, None] * target, proximity**0.5 * start])
    return torch.linalg.lstsq(rows, aims, driver="gels").solution  # of full rank


def test_a_low_rank_sum_is_proximal_to_where_it_starts_in_every_round():
    torch.manual_seed(0)
    down, up, change = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 8), (6, 2), (6, 8)))
    metrics = [torch.rand(8, dtype=torch.float64), torch.rand(6, dtype=torch.float64)]
    total, new_down, new_up = up @ down + change, down, up
    for _ in range(3):
        new_down = weighted_least_squares(new_up, total, metrics[1], down, 0.1)
        new_up = weighted_least_squares(new_down.T, total.T, metrics[0], up.T, 0.1).T
    torch.testing.assert_close(low_rank_sum(down, up, change, 0.1, metrics, rounds=3), (new_down, new_up))


def test_psi_lora_is_its_least_squares_of_the_whole_matrix():
    """With inputs, so that the metrics are of what the layer sees."""
    model, a, b, scaling = a_pair(2)
    optimizer = PSILoRA(model, lr=0.3)
    squares = {"in": 0.0, "out": 0.0}
    momentum = (optimizer.state[a]["momentum"].clone(), torch.zeros(6, 2, dtype=torch.float64))
    ones = {8: torch.ones(8, dtype=torch.float64), 6: torch.ones(6, dtype=torch.float64)}
    rho = 0.3 * 1e-2
    for step in range(1, 5):
        inputs, labels = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
        errors = model(inputs) - labels
        loss = errors.square().sum(-1).mean() / 2
        rows, outputs = inputs.reshape(15, 8), errors.detach().reshape(15, 6)
        optimizer.zero_grad()
        loss.backward()
        gradient = outputs.T @ rows / 15
        squares["in"] = 0.99 * squares["in"] + 0.01 * rows.square().mean(0)
        squares["out"] = 0.99 * squares["out"] + 0.01 * outputs.square().mean(0)
        of_columns, of_rows = ((squares[side] / (1 - 0.99**step) + 1e-5) ** 0.5 for side in ("in", "out"))
        before_a, before_b = a.detach().clone(), scaling * b.detach()
        mixed = 0.9 * momentum[1] @ momentum[0] + 0.1 * gradient
        target = before_b @ before_a - 0.3 * torch.diag(1 / of_rows) @ mixed @ torch.diag(1 / of_columns)
        new_a = weighted_least_squares(before_b, target, of_rows, before_a, rho)
        new_b = weighted_least_squares(new_a.T, target.T, of_columns, before_b.T, rho).T
        new_down = weighted_least_squares(momentum[1], mixed, ones[6], momentum[0], rho)
        momentum = (new_down, weighted_least_squares(new_down.T, mixed.T, ones[8], momentum[1].T, rho).T)
        optimizer.step()
        torch.testing.assert_close(a.detach(), new_a)
        torch.testing.assert_close(scaling * b.detach(), new_b)
        torch.testing.assert_close(optimizer.state[b]["momentum"], momentum[1])


def test_psi_lora_clips_the_full_gradient():
    moves = []
    for size, limit in ((1.0, torch.inf), (1e3, 1.0)):
        model, a, b, _ = a_pair(2)
        optimizer = PSILoRA(model, 0.3, max_grad_norm=limit)
        before = (b @ a).detach()
        gradient = torch.randn(6, 8, dtype=torch.float64)
        optimizer._gradients[a] = size * gradient / gradient.norm()
        optimizer.step()
        moves.append((b @ a).detach() - before)
    torch.testing.assert_close(*moves)


def outer_products(left, right, gradient):
    """What each column's squared scale is multiplied by, as vectors."""
    of_left = [torch.outer(column, gradient.T @ column) for column in left.T]
    of_right = [torch.outer(gradient @ column, column) for column in right.T]
    return torch.stack([matrix.flatten() for matrix in of_left + of_right], 1)


@pytest.mark.parametrize(("seed", "of_columns"), [(0, True), (105, False)])
def test_scaloras_scales_are_the_nearest(seed, of_columns):
    """Beside a numerical minimiser with squares that are not negative, of columns or of whole factors."""
    torch.manual_seed(seed)
    left, right, gradient = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 2), (8, 2), (6, 8)))
    scales = best_scales(left, right, 5 * gradient @ right, 5 * gradient.T @ left, reach=3.0)
    found = torch.cat(scales).square().numpy()
    products = outer_products(left, right, gradient).numpy()
    best, _ = nnls(products, gradient.flatten().numpy() / 3)
    assert (best > 0).all() == of_columns
    if not of_columns:
        best, _ = nnls(products.reshape(48, 2, 2).sum(2), gradient.flatten().numpy() / 3)
        assert (best > 0).all()
        best = best.repeat(2)
    assert found == pytest.approx(best)


def test_scaloras_scales_where_no_optimum_is_inside():
    """With the identity as gradient, one column would take away and the whole of ``left`` as well."""
    left, right = torch.tensor([[1.0, 1.0], [0.0, 0.1]]), torch.tensor([[2.0, 0.1], [0.0, 1.0]])
    products = outer_products(left, right, torch.eye(2))
    assert nnls(products.numpy(), torch.eye(2).flatten().numpy())[0].tolist()[1] == 0
    assert nnls(products.view(4, 2, 2).sum(2).numpy(), torch.eye(2).flatten().numpy())[0].tolist()[0] == 0
    assert best_scales(left, right, right, left, reach=3.0) is None


def test_scaloras_restart_changes_no_weight_and_its_steps_are_adams_on_scaled_factors():
    model, a, b, scaling = a_pair(2)
    layer = model.base_model.model[0]
    optimizer = ScaLoRA(model, lr=0.1)
    start = {"0.weight": layer.get_base_layer().weight.detach().clone()}
    weight, frozen = start["0.weight"] + scaling * (b @ a).detach(), start["0.weight"]
    moments = {name: [0.0, 0.0] for name in "ab"}
    restarts = 0
    for step in range(1, 7):
        gradient = torch.randn(6, 8, dtype=torch.float64)
        scales = best_scales(b.detach(), a.detach().T, gradient @ a.detach().T, gradient.T @ b.detach(), 3.0)
        of_b, of_a = scales or (torch.ones(2, dtype=torch.float64),) * 2
        restarts += scales is not None
        new = {"a": of_a[:, None] * a.detach(), "b": b.detach() * of_b}
        moments["a"] = [of_b[:, None] ** power * each for power, each in enumerate(moments["a"], 1)]
        moments["b"] = [of_a**power * each for power, each in enumerate(moments["b"], 1)]
        frozen = weight - scaling * new["b"] @ new["a"]
        seen = {"a": scaling * new["b"].T @ gradient, "b": scaling * gradient @ new["a"].T}
        backward(gradient, a, b, scaling)
        optimizer.step()
        torch.testing.assert_close(layer.get_base_layer().weight.detach(), frozen)
        for name, param in (("a", a), ("b", b)):
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * seen[name], 0.999 * second + 0.001 * seen[name] ** 2
            moments[name] = [first, second]
            direction = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            torch.testing.assert_close(param.detach(), new[name] - 0.1 * direction)
        weight = frozen + scaling * (b @ a).detach()
        torch.testing.assert_close(changes(model, start)["0.weight"], weight - start["0.weight"])
    assert restarts >= 4
    assert int(torch.linalg.matrix_rank(weight - start["0.weight"])) > 2, "no more than one adapter holds"


def test_scalora_leaves_a_start_from_zero():
    model, a, b, scaling = a_pair(2)
    torch.nn.init.zeros_(b)
    before = model.base_model.model[0].get_base_layer().weight.detach().clone()
    optimizer = ScaLoRA(model, lr=0.1)
    backward(torch.randn(6, 8, dtype=torch.float64), a, b, scaling)
    optimizer.step()
    assert torch.equal(model.base_model.model[0].get_base_layer().weight.detach(), before)
    assert float(b.detach().abs().min()) == pytest.approx(0.1, rel=1e-6)  # Adam's first step
