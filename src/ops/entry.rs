//! The operations: what each function of the public API is to the core.

use crate::array::{Array, Out};
use crate::kernels::finish::{APART, Terms};
use crate::threads;

use super::api::{Error, Exec, Grad, GradOutput, LossOptions, Reduction, Target};
use super::few;
use super::job::{Job, Kind};
use super::source::Bend;
use super::targets::{Labels, RowWeights, read_optional};

/// `log Σ exp(x)` over `axes`; `out` has the other axes.
pub fn logsumexp(exec: &Exec, x: &Array, axes: &[usize], out: &Out) -> Result<(), Error> {
    Job::new(Kind::LogSumExp, x, axes, None, None, Some(out), None, (Bend::default(), false), exec.level)?.run(exec).map(|_| ())
}

/// `exp(x − logsumexp(x))` over `axes`.
pub fn softmax(exec: &Exec, x: &Array, axes: &[usize], out: &Out) -> Result<(), Error> {
    if x.size() == 0 {
        // There may be any number of rows without classes.
        return Ok(());
    }
    Job::new(Kind::Softmax, x, axes, Some(out), None, None, None, (Bend::default(), false), exec.level)?.run(exec).map(|_| ())
}

/// `x − logsumexp(x)` over `axes`.
pub fn log_softmax(exec: &Exec, x: &Array, axes: &[usize], out: &Out) -> Result<(), Error> {
    if x.size() == 0 {
        return Ok(());
    }
    Job::new(Kind::LogSoftmax, x, axes, Some(out), None, None, None, (Bend::default(), false), exec.level)?.run(exec).map(|_| ())
}

/// Cross-entropy of logits; the reduced loss, or 0 when the rows go to `rows`. Everything is checked before anything is written.
pub fn cross_entropy(
    exec: &Exec,
    logits: &Array,
    axis: usize,
    target: &Target,
    options: &LossOptions,
    rows: Option<&Out>,
    grad: Option<&Grad>,
) -> Result<f64, Error> {
    let probs = if let Target::Probs(probs) = target { Some(probs) } else { None };
    let upstream = grad.and_then(|grad| if let GradOutput::Rows(rows) = &grad.grad_output { Some(rows) } else { None });
    let bend = Bend { softcap: options.softcap, mask: options.mask.as_ref() };
    let streams = probs.is_some() || options.label_smoothing > 0.0 && options.weight.is_some();
    let mut job = Job::new(Kind::Loss, logits, &[axis], grad.map(|grad| &grad.out), probs, rows, upstream, (bend, streams), exec.level)?;
    // The targets are read first, by the caller alone.
    let awake = if job.shared(exec) { threads::wake(exec.threads) } else { None };
    job.weight = read_optional(options.weight.as_ref())?;
    if !job.weight.is_empty() && job.weight.len() != job.classes.size {
        return Err(Error::Invalid("weight must have one element per class"));
    }
    let (sample, count) = (read_optional(options.sample_weight.as_ref())?, job.rows.size);
    let labels = Labels::new(awake.as_ref().map_or(1, |_| exec.threads), target, count, job.classes.size, options.ignore_index, &sample)?;
    let sparse = matches!(target, Target::Sparse { .. });
    job.weights = RowWeights::new(exec.level, labels.as_ref(), sparse, count, &job.weight, sample, options.normalizer)?;
    let divisor = if options.reduction == Reduction::Mean { job.weights.divisor } else { 1.0 };
    let e = options.label_smoothing;
    job.keep = 1.0 - e;
    job.spread = if e == 0.0 { 0.0 } else { e / job.classes.size as f64 };
    if let Some(grad) = grad {
        job.g = if let GradOutput::Scalar(g) = grad.grad_output { g } else { 1.0 };
        if options.reduction == Reduction::Mean {
            job.g /= divisor;
        }
    }
    job.terms = Terms {
        scale: 1.0 / options.temperature,
        z_loss: options.z_loss,
        ulp: job.terms.ulp,
        entries: labels.as_ref().map_or(0, |labels| labels.entries),
        dense: probs.is_some() || e > 0.0,
        gradient: grad.is_some(),
        stored: false,
        plain: None,
        loss: true,
    };
    job.labels = labels;
    afford(exec, &job)?;
    // Rows without classes lose nothing; there may be any number of them.
    let sum = if job.classes.size == 0 && rows.is_none() && options.z_loss == 0.0 { 0.0 } else { job.run(exec)? };
    drop(awake);
    Ok(match options.reduction {
        Reduction::Mean => sum / divisor,
        Reduction::Sum => sum,
        Reduction::None => 0.0,
    })
}

/// The mean of [`cross_entropy`] without options over the last axis, for calls so small that looking at options takes longer: nothing where it has
/// to be asked, as `few::small` says.
pub fn small_cross_entropy(exec: &Exec, logits: &Array, target: &Array, ignore_index: Option<i64>, out: Option<&Out>) -> Option<f64> {
    few::small(exec, logits, target, ignore_index, out)
}

/// Asks for the scratch memory that grows with the arguments (classes that a smoothing stream names, classes per sparse row) and gives it back,
/// so that sizes out of all proportion are an error before anything is written.
fn afford(exec: &Exec, job: &Job) -> Result<(), Error> {
    const LARGE: usize = 1 << 12;
    let stream = if job.terms.dense && !job.own_dense() && !job.even() { job.classes.size } else { 0 };
    let per_thread = job.terms.entries.checked_mul(4 * APART).and_then(|entries| entries.checked_add(stream));
    let all = per_thread.and_then(|one| one.checked_mul(exec.threads)).ok_or(Error::OutOfMemory)?;
    if all > LARGE {
        // Twice, because vectors that grow may take twice what they need.
        Vec::<[f64; 2]>::new().try_reserve_exact(all).map_err(|_| Error::OutOfMemory)?;
    }
    Ok(())
}
