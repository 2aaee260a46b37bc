//! The losses, with and without gradient.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyTuple};

use super::arrays::{Accept, View, is_ndarray, view};
use super::config;
use super::errors::{Context, value_error};
use super::options;
use super::results::Output;
use super::targets::{self, Logits};
use crate::array::{DType, Dims};
use crate::ops::{self, Grad, LossOptions, Reduction, Target};

type Object<'a, 'py> = &'a Bound<'py, PyAny>;

/// Arguments that every loss has.
struct Common<'a, 'py> {
    logits: Object<'a, 'py>,
    target: Object<'a, 'py>,
    axis: Object<'a, 'py>,
    weight: Object<'a, 'py>,
    ignore_index: Object<'a, 'py>,
    reduction: Object<'a, 'py>,
}

/// Arguments of `cross_entropy` only.
struct Extra<'a, 'py> {
    label_smoothing: Object<'a, 'py>,
    sample_weight: Object<'a, 'py>,
    normalizer: Object<'a, 'py>,
    z_loss: Object<'a, 'py>,
    softcap: Object<'a, 'py>,
    temperature: Object<'a, 'py>,
    mask: Object<'a, 'py>,
}

/// Arguments of the functions that give a gradient.
struct WithGrad<'a, 'py> {
    grad_output: Object<'a, 'py>,
    out: Object<'a, 'py>,
}

#[pyfunction]
#[pyo3(signature = (log_probs, target, axis, weight, ignore_index, reduction, /))]
pub(super) fn nll_loss<'py>(
    log_probs: &Bound<'py, PyAny>,
    target: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    ignore_index: &Bound<'py, PyAny>,
    reduction: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    loss(&Common { logits: log_probs, target, axis, weight, ignore_index, reduction }, None, None)
}

#[pyfunction]
#[pyo3(signature = (log_probs, target, axis, weight, ignore_index, reduction, grad_output, out, /))]
pub(super) fn nll_loss_with_grad<'py>(
    log_probs: &Bound<'py, PyAny>,
    target: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    ignore_index: &Bound<'py, PyAny>,
    reduction: &Bound<'py, PyAny>,
    grad_output: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    loss(&Common { logits: log_probs, target, axis, weight, ignore_index, reduction }, None, Some(&WithGrad { grad_output, out }))
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, axis, weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, z_loss, softcap, temperature, mask, /
))]
pub(super) fn cross_entropy<'py>(
    logits: &Bound<'py, PyAny>,
    target: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    ignore_index: &Bound<'py, PyAny>,
    reduction: &Bound<'py, PyAny>,
    label_smoothing: &Bound<'py, PyAny>,
    sample_weight: &Bound<'py, PyAny>,
    normalizer: &Bound<'py, PyAny>,
    z_loss: &Bound<'py, PyAny>,
    softcap: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    mask: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let extra = Extra { label_smoothing, sample_weight, normalizer, z_loss, softcap, temperature, mask };
    loss(&Common { logits, target, axis, weight, ignore_index, reduction }, Some(&extra), None)
}

#[pyfunction]
#[pyo3(signature = (
    logits, target, axis, weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, z_loss, softcap, temperature, mask,
    grad_output, out, /
))]
pub(super) fn cross_entropy_with_grad<'py>(
    logits: &Bound<'py, PyAny>,
    target: &Bound<'py, PyAny>,
    axis: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    ignore_index: &Bound<'py, PyAny>,
    reduction: &Bound<'py, PyAny>,
    label_smoothing: &Bound<'py, PyAny>,
    sample_weight: &Bound<'py, PyAny>,
    normalizer: &Bound<'py, PyAny>,
    z_loss: &Bound<'py, PyAny>,
    softcap: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    mask: &Bound<'py, PyAny>,
    grad_output: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let extra = Extra { label_smoothing, sample_weight, normalizer, z_loss, softcap, temperature, mask };
    loss(&Common { logits, target, axis, weight, ignore_index, reduction }, Some(&extra), Some(&WithGrad { grad_output, out }))
}

/// The arrays among the extra arguments, and the numbers.
struct Parsed<'py> {
    label_smoothing: f64,
    sample_weight: Option<View<'py>>,
    normalizer: Option<f64>,
    z_loss: f64,
    softcap: Option<f64>,
    temperature: f64,
    mask: Option<View<'py>>,
}

impl<'py> Parsed<'py> {
    const OFF: Self =
        Self { label_smoothing: 0.0, sample_weight: None, normalizer: None, z_loss: 0.0, softcap: None, temperature: 1.0, mask: None };

    fn new(extra: &Extra<'_, 'py>, logits: &Logits<'_>, dtype: DType) -> PyResult<Self> {
        const POSITIVE: &str = "a positive finite number";
        Ok(Self {
            label_smoothing: options::number(extra.label_smoothing, "label_smoothing", "in [0, 1]", |e| (0.0..=1.0).contains(&e))?,
            sample_weight: targets::sample_weight(extra.sample_weight, logits)?,
            normalizer: options::optional(extra.normalizer, "normalizer", POSITIVE, options::positive)?,
            z_loss: options::number(extra.z_loss, "z_loss", "a finite number", f64::is_finite)?,
            softcap: options::optional(extra.softcap, "softcap", POSITIVE, options::positive)?,
            temperature: options::temperature(extra.temperature, dtype)?,
            mask: targets::mask(extra.mask, logits)?,
        })
    }
}

impl Extra<'_, '_> {
    /// Whether every option is off, as far as that can be seen at a glance.
    fn is_off(&self) -> bool {
        let is = |object: Object<'_, '_>, value: f64| object.cast_exact::<PyFloat>().is_ok_and(|float| float.value() == value);
        [self.sample_weight, self.normalizer, self.softcap, self.mask].iter().all(|object| object.is_none())
            && is(self.label_smoothing, 0.0)
            && is(self.z_loss, 0.0)
            && is(self.temperature, 1.0)
    }
}

/// A small call without options; nothing where there is more to look at.
fn small<'py>(
    common: &Common<'_, 'py>,
    extra: &Extra<'_, 'py>,
    with_grad: Option<&WithGrad<'_, 'py>>,
    x: &View<'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = common.logits.py();
    let plain = x.ndim() == 2
        && x.array().size() <= ops::SMALL_SIZE
        && common.weight.is_none()
        && extra.is_off()
        && is_ndarray(common.target)
        && with_grad.is_none_or(|with_grad| with_grad.grad_output.is_none() && with_grad.out.is_none())
        && common.reduction.is(intern!(py, "mean"))
        && matches!(common.axis.extract(), Ok(-1 | 1));
    if !plain {
        return Ok(None);
    }
    let ignore_index = if common.ignore_index.is_none() { None } else { Some(options::integer(common.ignore_index, "ignore_index")?) };
    let Ok(y) = view(common.target, "target", Accept::Integers) else { return Ok(None) };
    if y.shape() != &x.shape()[..1] {
        return Ok(None);
    }
    let out = with_grad.map(|_| Output::like(py, x.array())).transpose()?;
    let exec = config::serial();
    let Some(value) = ops::small_cross_entropy(&exec, x.array(), y.array(), ignore_index, out.as_ref().map(Output::out)) else {
        return Ok(None);
    };
    let loss = PyFloat::new(py, value).into_any();
    match out {
        None => Ok(Some(loss)),
        Some(out) => PyTuple::new(py, [loss, out.into_python()]).map(|pair| Some(pair.into_any())),
    }
}

fn loss<'py>(
    common: &Common<'_, 'py>,
    extra: Option<&Extra<'_, 'py>>,
    with_grad: Option<&WithGrad<'_, 'py>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = common.logits.py();
    let name = if extra.is_some() { "logits" } else { "log_probs" };
    let x = view(common.logits, name, Accept::Floats)?;
    if x.ndim() == 0 {
        return Err(value_error(format!("{name} has no axis; a loss needs a class axis (one row of C classes has shape (C,))")));
    }
    if let Some(extra) = extra
        && let Some(result) = small(common, extra, with_grad, &x)?
    {
        return Ok(result);
    }
    let axis = options::axis(common.axis, name, x.ndim())?;
    let mut rows = Dims::from_slice(x.shape());
    rows.remove(axis.1);
    let logits = Logits { name, shape: x.shape(), axis, rows };

    let reduction = options::reduction(common.reduction)?;
    let mut ignore_index = if common.ignore_index.is_none() { None } else { Some(options::integer(common.ignore_index, "ignore_index")?) };
    let parsed = extra.map_or(Ok(Parsed::OFF), |extra| Parsed::new(extra, &logits, x.dtype()))?;
    let weight = targets::weight(common.weight, &logits)?;
    let goal = if extra.is_some() { targets::any(common.target, &logits)? } else { targets::indices(common.target, &logits)? };
    if goal.is_probable() {
        if let Some(index @ 0..) = ignore_index {
            return Err(value_error(format!(
                "ignore_index = {index} has no meaning with class probabilities; leave rows out with sample_weight=0"
            )));
        }
        ignore_index = None;
    }

    let grad = match with_grad {
        None => None,
        Some(with_grad) => {
            let upstream = targets::upstream(with_grad.grad_output, reduction, &logits)?;
            let out = if with_grad.out.is_none() {
                Output::like(py, x.array())?
            } else {
                let mut inputs = vec![(name, &x)];
                let optional = [("weight", &weight), ("sample_weight", &parsed.sample_weight), ("where", &parsed.mask)];
                inputs.extend(optional.iter().filter_map(|(name, view)| view.as_ref().map(|view| (*name, view))));
                goal.each(&mut inputs);
                if let targets::Upstream::Rows(rows) = &upstream {
                    inputs.push(("grad_output", rows));
                }
                Output::given(with_grad.out, x.shape(), x.dtype(), true, &inputs)?
            };
            Some((out, upstream))
        }
    };
    let losses = if reduction == Reduction::None { Some(Output::fresh(py, &logits.rows, x.dtype().row_dtype())?) } else { None };

    let value = {
        let settings = LossOptions {
            weight: weight.as_ref().map(|view| view.array().clone()),
            ignore_index,
            label_smoothing: parsed.label_smoothing,
            reduction,
            sample_weight: parsed.sample_weight.as_ref().map(|view| view.array().clone()),
            normalizer: parsed.normalizer,
            z_loss: parsed.z_loss,
            softcap: parsed.softcap,
            temperature: parsed.temperature,
            mask: parsed.mask.as_ref().map(|view| targets::broadcast(view, logits.shape)),
        };
        let target = goal.target(&logits.rows);
        let grad = grad.as_ref().map(|(out, upstream)| Grad { out: out.out().clone(), grad_output: upstream.grad_output() });
        let (array, losses, is_nll) = (x.array(), losses.as_ref().map(Output::out), extra.is_none());
        config::run(py, array.size(), |exec| match &target {
            Target::Index(labels) if is_nll => ops::nll_loss(exec, array, axis.1, labels, &settings, losses, grad.as_ref()),
            target => ops::cross_entropy(exec, array, axis.1, target, &settings, losses, grad.as_ref()),
        })?
    };
    let value = value.map_err(|error| {
        Context { logits: name, shape: logits.shape, axis, target: goal.shape(), can_ignore: !goal.is_probable() }.raise(py, error)
    })?;

    let loss = losses.map_or_else(|| PyFloat::new(py, value).into_any(), Output::into_python);
    match grad {
        None => Ok(loss),
        Some((out, _)) => PyTuple::new(py, [loss, out.into_python()]).map(Bound::into_any),
    }
}
