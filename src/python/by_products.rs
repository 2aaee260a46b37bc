//! What else one reading of the logits gives: scores of tokens, the largest log-probabilities, the divergence of two distributions.

use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyTuple};

use super::arrays::{Accept, View, view};
use super::config;
use super::errors::{Context, internal, shape as show, value_error};
use super::options;
use super::results::Output;
use super::targets::{self, Logits, Upstream};
use crate::array::{Array, DType, Dims};
use crate::ops::{self, Error, Grad, Reduction, Scores};

type Object<'a, 'py> = &'a Bound<'py, PyAny>;

/// Logits with their class axis.
fn logits<'py>(object: Object<'_, 'py>, name: &'static str, axis: Object<'_, 'py>) -> PyResult<(View<'py>, (i64, usize))> {
    let x = view(object, name, Accept::Floats)?;
    if x.ndim() == 0 {
        return Err(value_error(format!("{name} has no axis; a class axis is needed (one row of C classes has shape (C,))")));
    }
    let axis = options::axis(axis, name, x.ndim())?;
    Ok((x, axis))
}

fn describe<'a>(x: &'a View<'_>, name: &'static str, axis: (i64, usize)) -> Logits<'a> {
    let mut rows: Dims<usize> = x.shape().into();
    rows.remove(axis.1);
    Logits { name, shape: x.shape(), axis, rows }
}

/// All but one position of an axis: the last, or the first where `from` is 1.
fn shorten<'a>(array: &Array<'a>, axis: usize, from: isize) -> Array<'a> {
    let mut shape: Dims<usize> = array.shape().into();
    shape[axis] = shape[axis].saturating_sub(1);
    let start = if shape.contains(&0) { 0 } else { from * array.strides()[axis] };
    // SAFETY: one position less, from the second on if `from` is 1: the same elements or fewer.
    unsafe { Array::new(array.ptr.offset(start), array.dtype(), array.swapped, &shape, array.strides()) }
}

#[pyfunction]
#[pyo3(signature = (logits, tokens, axis, ignore_index, shift, entropy, rank, /))]
pub(super) fn score_tokens<'py>(
    logits: &Bound<'py, PyAny>,
    tokens: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    ignore_index: &Bound<'py, PyAny>,
    shift: &Bound<'py, PyAny>,
    entropy: &Bound<'py, PyAny>,
    rank: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = logits.py();
    let (x, axis) = self::logits(logits, "logits", axis)?;
    let described = describe(&x, "logits", axis);
    let ignore = if ignore_index.is_none() { None } else { Some(options::integer(ignore_index, "ignore_index")?) };
    let (shift, entropy, rank) = (shift.is_truthy()?, entropy.is_truthy()?, rank.is_truthy()?);
    let tokens = targets::class_indices(tokens, "tokens", &described)?;
    let (mut array, mut scored) = (x.array().clone(), tokens.array().clone());
    if shift {
        let Some(time) = tokens.ndim().checked_sub(1) else {
            return Err(value_error(format!("shift=True needs an axis of tokens; logits with shape {} have none", show(x.shape()))));
        };
        array = shorten(&array, time + usize::from(time >= axis.1), 0);
        scored = shorten(&scored, time, 1);
    }
    let fresh = |dtype| Output::fresh(py, scored.shape(), dtype);
    let row = x.dtype().row_dtype();
    let results = [fresh(row)?, fresh(row)?, fresh(DType::I64)?, fresh(DType::Bool)?];
    let entropy = if entropy { Some(fresh(row)?) } else { None };
    let rank = if rank { Some(fresh(DType::I64)?) } else { None };
    let done = {
        let [logprob, logsumexp, argmax, greedy] = &results;
        let scores = Scores {
            logprob: logprob.out().clone(),
            logsumexp: logsumexp.out().clone(),
            argmax: argmax.out().clone(),
            greedy: greedy.out().clone(),
            entropy: entropy.as_ref().map(|output| output.out().clone()),
            rank: rank.as_ref().map(|output| output.out().clone()),
        };
        config::run(py, array.size(), |exec| ops::score_tokens(exec, &array, axis.1, &scored, ignore, &scores))?
    };
    done.map_err(|mut error| {
        if let Error::TargetOutOfBounds { position, .. } = &mut error
            && shift
        {
            // Positions are those of the argument, whose last axis is one longer.
            *position += *position / scored.shape().last().copied().unwrap_or(1) + 1;
        }
        Context { logits: "logits", shape: x.shape(), axis, target: tokens.shape(), can_ignore: true }.raise(py, error)
    })?;
    let optional = |output: Option<Output<'py>>| output.map_or_else(|| py.None().into_bound(py), Output::into_python);
    let [logprob, logsumexp, argmax, greedy] = results.map(Output::into_python);
    PyTuple::new(py, [logprob, logsumexp, argmax, optional(entropy), optional(rank), greedy]).map(Bound::into_any)
}

#[pyfunction]
#[pyo3(signature = (logits, k, axis, /))]
pub(super) fn topk_logprobs<'py>(
    logits: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = logits.py();
    let (x, axis) = self::logits(logits, "logits", axis)?;
    let given = options::integer(k, "k")?;
    let classes = x.shape()[axis.1];
    let Some(k) = usize::try_from(given).ok().filter(|&k| k <= classes) else {
        return Err(value_error(format!(
            "k = {given} is not in [0, {classes}]; logits with shape {} and axis={} have {classes} classes",
            show(x.shape()),
            axis.0
        )));
    };
    let mut shape: Dims<usize> = x.shape().into();
    shape[axis.1] = k;
    let (logprobs, indices) = (Output::fresh(py, &shape, x.dtype().row_dtype())?, Output::fresh(py, &shape, DType::I64)?);
    let done = {
        let (array, values, places) = (x.array(), logprobs.out(), indices.out());
        config::run(py, array.size(), |exec| ops::topk_logprobs(exec, array, axis.1, values, places))?
    };
    done.map_err(internal)?;
    PyTuple::new(py, [logprobs.into_python(), indices.into_python()]).map(Bound::into_any)
}

#[pyfunction]
#[pyo3(signature = (p_logits, q_logits, axis, temperature, reduction, /))]
pub(super) fn kl_divergence<'py>(
    p_logits: &Bound<'py, PyAny>,
    q_logits: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    reduction: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    kl(p_logits, q_logits, axis, temperature, reduction, None)
}

#[pyfunction]
#[pyo3(signature = (p_logits, q_logits, axis, temperature, reduction, grad_output, out, /))]
pub(super) fn kl_divergence_with_grad<'py>(
    p_logits: &Bound<'py, PyAny>,
    q_logits: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    reduction: &Bound<'py, PyAny>,
    grad_output: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    kl(p_logits, q_logits, axis, temperature, reduction, Some((grad_output, out)))
}

fn kl<'py>(
    p_logits: Object<'_, 'py>,
    q_logits: Object<'_, 'py>,
    axis: Object<'_, 'py>,
    temperature: Object<'_, 'py>,
    reduction: Object<'_, 'py>,
    with_grad: Option<(Object<'_, 'py>, Object<'_, 'py>)>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = p_logits.py();
    let (p, axis) = logits(p_logits, "p_logits", axis)?;
    let q = view(q_logits, "q_logits", Accept::Floats)?;
    if p.shape() != q.shape() {
        return Err(value_error(format!(
            "q_logits has shape {}; it must have the shape of p_logits, {}",
            show(q.shape()),
            show(p.shape())
        )));
    }
    let wider = if p.dtype() == DType::F64 { p.dtype() } else { q.dtype() };
    let temperature = options::temperature(temperature, wider)?;
    let reduction = options::reduction(reduction)?;
    let described = describe(&q, "q_logits", axis);
    let grad = match with_grad {
        None => None,
        Some((grad_output, out)) => {
            let upstream = targets::upstream(grad_output, reduction, &described)?;
            let out = if out.is_none() {
                Output::like(py, q.array())?
            } else {
                let mut inputs = vec![("q_logits", &q), ("p_logits", &p)];
                if let Upstream::Rows(rows) = &upstream {
                    inputs.push(("grad_output", rows));
                }
                Output::given(out, q.shape(), q.dtype(), true, &inputs)?
            };
            Some((out, upstream))
        }
    };
    let row = if p.dtype() == DType::F64 { DType::F64 } else { q.dtype().row_dtype() };
    let losses = if reduction == Reduction::None { Some(Output::fresh(py, &described.rows, row)?) } else { None };
    let value = {
        let grad = grad.as_ref().map(|(out, upstream)| Grad { out: out.out().clone(), grad_output: upstream.grad_output() });
        let (p, q, rows) = (p.array(), q.array(), losses.as_ref().map(Output::out));
        config::run(py, p.size(), |exec| ops::kl_divergence(exec, p, q, axis.1, temperature, reduction, rows, grad.as_ref()))?
    };
    let value = value.map_err(internal)?;
    let loss = losses.map_or_else(|| PyFloat::new(py, value).into_any(), Output::into_python);
    match grad {
        None => Ok(loss),
        Some((out, _)) => PyTuple::new(py, [loss, out.into_python()]).map(Bound::into_any),
    }
}
