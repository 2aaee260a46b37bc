//! Scores of given tokens: log-probability, logsumexp and argmax, and on demand entropy and rank, in one reading of the logits.

use crate::array::{Array, DType, Out, Vf};
use crate::kernels::scan::BLOCK;
use crate::kernels::scan::{Constants, Scan, Total, larger};
use crate::simd::{Isa, Kernel, Mask, Vector};
use crate::threads;

use super::api::{Error, Exec};
use super::blocks::{Chunk, Feed, Layout, Operand, RowResult, TILE, assert_asked, in_float64, states};
use super::job::{TASK, rows_per_task};
use super::plan::with_axes;
use super::scratch::{SCRATCH, Work};
use super::targets::{NONE, classes, filled, row_shape};

/// Where the scores go; each has the shape of the rows.
#[derive(Clone, Debug)]
pub struct Scores<'a> {
    /// Float.
    pub logprob: Out<'a>,
    /// Float.
    pub logsumexp: Out<'a>,
    /// int64; the first of equals, and the first NaN of a row that has one.
    pub argmax: Out<'a>,
    /// bool: whether the token is the argmax.
    pub greedy: Out<'a>,
    /// Float: −Σ p·log p.
    pub entropy: Option<Out<'a>>,
    /// int64: how many classes have a larger logit than the token.
    pub rank: Option<Out<'a>>,
}

/// Scores `tokens` (the shape of the rows); positions that are `ignore` get 0, and −1 for classes and ranks. Everything is checked before
/// anything is written.
pub fn score_tokens(exec: &Exec, logits: &Array, axis: usize, tokens: &Array, ignore: Option<i64>, scores: &Scores) -> Result<(), Error> {
    let shape = logits.shape();
    if axis >= shape.len() || !logits.dtype().is_float() {
        return Err(Error::Invalid("axis or dtype of the logits"));
    }
    let row = logits.dtype().row_dtype();
    let results = [
        (Some(&scores.logprob), row),
        (Some(&scores.logsumexp), row),
        (Some(&scores.argmax), DType::I64),
        (Some(&scores.greedy), DType::Bool),
        (scores.entropy.as_ref(), row),
        (scores.rank.as_ref(), DType::I64),
    ];
    let rows = row_shape(shape, &[axis]);
    for array in core::iter::once(tokens).chain(results.iter().filter_map(|(out, _)| out.map(Out::array))) {
        if array.shape() != &rows[..] {
            return Err(Error::Invalid("an array does not have the shape of the rows"));
        }
    }
    if tokens.dtype().is_float() || results.iter().any(|(out, dtype)| out.is_some_and(|out| out.array().dtype() != *dtype)) {
        return Err(Error::Invalid("dtype of the tokens or of a result"));
    }
    // Results that are not there go along with one that is.
    let strides = results.map(|(out, _)| with_axes(out.unwrap_or(&scores.logprob).array().strides(), shape.len(), &[axis]));
    let operands: Vec<&[isize]> = core::iter::once(logits.strides()).chain(strides.iter().map(|strides| &strides[..])).collect();
    let layout = Layout::new(shape, axis, &operands);
    let mut class = filled(NONE, layout.rows.size)?;
    classes(1, "tokens", tokens, layout.classes.size, ignore, (&[], 1), &mut class, 1, 0)?;

    let x = Operand::new(logits, 0, &layout);
    let result = |i: usize| results[i].0.map(|out| RowResult { out, index: i + 1 });
    let (Some(logprob), Some(logsumexp), Some(argmax), Some(greedy)) = (result(0), result(1), result(2), result(3)) else {
        return Err(Error::Invalid("a result is missing"));
    };
    let job = Job { x, layout: &layout, class: &class, logprob, logsumexp, argmax, greedy, entropy: result(4), rank: result(5) };
    let per_task = rows_per_task(layout.rows.size, layout.classes.size);
    let per_task = if job.x.is_tiled() { per_task.next_multiple_of(TILE) } else { per_task };
    let threads = if layout.rows.size * layout.classes.size < 2 * TASK { 1 } else { exec.threads };
    let wide = in_float64(exec.level, logits.dtype());
    let task = |task: usize| {
        let (first, last) = (task * per_task, layout.rows.size.min((task + 1) * per_task));
        let mut scratch = SCRATCH.take().unwrap_or_default();
        if wide {
            exec.level.run(Chunk::<_, f64>::new(&job, first, last, &mut scratch));
        } else {
            exec.level.run(Chunk::<_, f32>::new(&job, first, last, &mut scratch));
        }
        SCRATCH.set(Some(scratch));
    };
    threads::for_each(threads, layout.rows.size.div_ceil(per_task), &task);
    Ok(())
}

struct Job<'a> {
    x: Operand<'a>,
    layout: &'a Layout,
    class: &'a [i64],
    logprob: RowResult<'a>,
    logsumexp: RowResult<'a>,
    argmax: RowResult<'a>,
    greedy: RowResult<'a>,
    entropy: Option<RowResult<'a>>,
    rank: Option<RowResult<'a>>,
}

impl Job<'_> {
    fn put(&self, row: usize, x: f64, total: &Total, log_sum: f64, entropy: f64, rank: usize) {
        let token = self.class[row];
        let argmax = if total.nan { self.first_nan(row) } else { total.arg };
        self.logprob.set(self.layout, row, total.log_prob(x, log_sum));
        self.logsumexp.set(self.layout, row, total.logsumexp(log_sum));
        self.argmax.set_int(self.layout, row, argmax as i64);
        self.greedy.set_int(self.layout, row, i64::from(argmax as i64 == token));
        if let Some(out) = &self.entropy {
            out.set(self.layout, row, entropy);
        }
        if let Some(out) = &self.rank {
            out.set_int(self.layout, row, rank as i64);
        }
    }

    fn ignore(&self, row: usize) {
        for out in [&self.logprob, &self.logsumexp].into_iter().chain(&self.entropy) {
            out.set(self.layout, row, 0.0);
        }
        for out in [&self.argmax].into_iter().chain(&self.rank) {
            out.set_int(self.layout, row, -1);
        }
        self.greedy.set_int(self.layout, row, 0);
    }

    /// As `numpy.argmax` has it.
    fn first_nan(&self, row: usize) -> usize {
        (0..self.layout.classes.size).find(|&class| self.x.get::<f64>(row, class).is_nan()).unwrap_or(0)
    }
}

impl<T: Work> Kernel for Chunk<'_, Job<'_>, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        assert_asked::<S, T>();
        let Chunk { job, first, last, .. } = self;
        let (_, buffers, _) = T::buffers(self.scratch);
        let feed = Feed::new(&job.x, &mut buffers.x);
        if job.entropy.is_some() {
            score::<S, T, true>(isa, job, first, last, feed);
        } else {
            score::<S, T, false>(isa, job, first, last, feed);
        }
    }
}

#[inline(always)]
fn score<S: Isa, T: Work, const SPREAD: bool>(isa: S, job: &Job, first: usize, last: usize, mut feed: Feed<T>) {
    let constants = Constants::<S, T>::new(isa, 1.0);
    let empty = Scan::new(&constants);
    let classes = job.layout.classes.size;
    let (mut logit, mut rank) = ([T::ZERO; TILE], [0; TILE]);
    let mut scans = states(empty, job.x.is_tiled());
    let mut row = first;
    while row < last {
        let n = job.layout.together(job.x.is_tiled(), row, last);
        rank[..n].fill(0);
        scans[..n].fill(empty);
        let mut any = false;
        for (slot, logit) in logit[..n].iter_mut().enumerate() {
            if let Ok(class) = usize::try_from(job.class[row + slot]) {
                *logit = job.x.get(row + slot, class);
                any = true;
            }
        }
        for start in (0..if any { classes } else { 0 }).step_by(BLOCK) {
            let len = BLOCK.min(classes - start);
            feed.load(S::LEVEL, &job.x, row, n, start, len);
            for slot in (0..n).filter(|slot| job.class[row + slot] != NONE) {
                let (block, next) = feed.block(&job.x, row, slot, start, len);
                let top = scans[slot].block::<SPREAD>(&constants, block, next, start);
                // Most blocks have nothing above a token that is likely.
                if job.rank.is_some() && Vf::<S, T>::splat(isa, logit[slot]).lt(top).any() {
                    rank[slot] += larger(isa, block, logit[slot]);
                }
            }
        }
        for slot in 0..n {
            if job.class[row + slot] == NONE {
                job.ignore(row + slot);
            } else {
                let total = scans[slot].total();
                let log_sum = total.log_sum(isa);
                let entropy = if SPREAD { scans[slot].entropy(&total, log_sum) } else { 0.0 };
                job.put(row + slot, logit[slot].to_f64(), &total, log_sum, entropy, rank[slot]);
            }
        }
        row += n;
    }
}
