"""The quality studies work: a few steps of each kind, resumed where they stopped, and the pages of their results."""

import json
import re
from collections import OrderedDict

import pandas
import peft
import pytest
import torch
from torch import nn

import quality
from studies.captured import shares
from studies.methods import METHODS
from studies.page import GONE, at_one_rate, below, chosen_of, gaps, read_study, values_of, write_quality
from studies.peers import AltLoRAPlus, LoRAPro, LoRARITE
from studies.tasks import Factorisation
from studies.training import best_of_rank, compare


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


@pytest.mark.parametrize(
    "file", sorted((quality.RESULTS / "quality").glob("*.findings.md")), ids=lambda file: file.name
)
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


def test_a_start_from_gradients_is_taken_out_of_the_weight():
    task = Factorisation(m=12, n=9, rank=4)  # LoRA-GA takes twice as many directions as the adapters have
    model = task.model(0)
    weight = model[0].weight.detach().clone()
    prepared = METHODS[quality.GRADIENT].prepare(task, model, rank=2, lr=1e-3, seed=0)
    (layer,) = (module for module in prepared.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    adapter = layer.get_delta_weight("default").detach()
    assert float(adapter.norm()) > 1e-3
    torch.testing.assert_close(layer.get_base_layer().weight.detach() - weight, -adapter)  # float32 throughout


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
