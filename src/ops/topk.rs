//! The largest log-probabilities of each row, with the logsumexp from the same reading of the logits.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::array::{Array, DType, Out};
use crate::kernels::scan::BLOCK;
use crate::kernels::scan::{Constants, Largest, Scan};
use crate::simd::{Isa, Kernel};
use crate::threads;

use super::api::{Error, Exec};
use super::blocks::{Chunk, Feed, Layout, Operand, TILE, assert_asked, in_float64, states};
use super::job::{TASK, rows_per_task};
use super::plan::Axes;
use super::scratch::{SCRATCH, Work};

/// The `k` largest of log-softmax over `axis` in falling order, ties by the lower index, and their classes (int64); both results have the
/// logits' shape with k in place of the classes.
pub fn topk_logprobs(exec: &Exec, logits: &Array, axis: usize, logprobs: &Out, indices: &Out) -> Result<(), Error> {
    let shape = logits.shape();
    if axis >= shape.len() || !logits.dtype().is_float() {
        return Err(Error::Invalid("axis or dtype of the logits"));
    }
    let like = logprobs.array().shape();
    let fits = |(i, (&a, &b)): (usize, (&usize, &usize))| if i == axis { a <= b } else { a == b };
    if like.len() != shape.len() || !like.iter().zip(shape).enumerate().all(fits) || indices.array().shape() != like {
        return Err(Error::Invalid("shape of a result"));
    }
    if logprobs.array().dtype() != logits.dtype().row_dtype() || indices.array().dtype() != DType::I64 {
        return Err(Error::Invalid("dtype of a result"));
    }
    let strides = [logits.strides(), logprobs.array().strides(), indices.array().strides()];
    // The results have another length on the class axis, which is a line in each operand.
    let layout = Layout::new(shape, axis, &strides);
    let k = like[axis];
    let chosen = Axes::new(like, &strides, core::iter::once(axis));
    let job =
        Job { x: Operand::new(logits, 0, &layout), layout: &layout, k, chosen: &chosen, logprobs, indices, failed: AtomicBool::new(false) };
    if k == 0 {
        return Ok(());
    }
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
    if job.failed.load(Ordering::Relaxed) { Err(Error::OutOfMemory) } else { Ok(()) }
}

struct Job<'a> {
    x: Operand<'a>,
    layout: &'a Layout,
    k: usize,
    /// The axis of the results.
    chosen: &'a Axes,
    logprobs: &'a Out<'a>,
    indices: &'a Out<'a>,
    failed: AtomicBool,
}

impl<T: Work> Kernel for Chunk<'_, Job<'_>, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        assert_asked::<S, T>();
        let Chunk { job, first, last, .. } = self;
        let (_, buffers, _) = T::buffers(self.scratch);
        search(isa, job, first, last, Feed::new(&job.x, &mut buffers.x));
    }
}

#[inline(always)]
fn search<S: Isa, T: Work>(isa: S, job: &Job, first: usize, last: usize, mut feed: Feed<T>) {
    let constants = Constants::<S, T>::new(isa, 1.0);
    let empty = Scan::new(&constants);
    let classes = job.layout.classes.size;
    let (mut scans, mut best) = (states(empty, job.x.is_tiled()), Vec::new());
    best.resize_with(scans.len(), Largest::<T>::default);
    let mut row = first;
    while row < last {
        // Rows share a tile as long as their candidates take little memory.
        let n = job.layout.together(job.x.is_tiled(), row, last).min((TASK / job.k).max(1));
        scans[..n].fill(empty);
        for best in &mut best[..n] {
            if !best.begin(job.k) {
                job.failed.store(true, Ordering::Relaxed);
                return;
            }
        }
        for start in (0..classes).step_by(BLOCK) {
            let len = BLOCK.min(classes - start);
            feed.load(S::LEVEL, &job.x, row, n, start, len);
            for slot in 0..n {
                let (block, next) = feed.block(&job.x, row, slot, start, len);
                let top = scans[slot].block::<false>(&constants, block, next, start);
                best[slot].block(isa, block, top, start);
            }
        }
        for slot in 0..n {
            let total = scans[slot].total();
            let log_sum = total.log_sum(isa);
            let found = best[slot].finish();
            let bases = [job.layout.rows.offset(1, row + slot), job.layout.rows.offset(2, row + slot)];
            let put = |i: usize, class: usize, logprob: f64| {
                job.logprobs.set(bases[0] + job.chosen.offset(1, i), logprob);
                job.indices.set_int(bases[1] + job.chosen.offset(2, i), class as i64);
            };
            for (i, &(x, class)) in found.iter().enumerate() {
                put(i, class, total.log_prob(x, log_sum));
            }
            // NaN comes last, and there is one in the row: every log-probability is NaN.
            if found.len() < job.k {
                let nan = (0..classes).filter(|&class| job.x.get::<f64>(row + slot, class).is_nan());
                for (i, class) in (found.len()..job.k).zip(nan) {
                    put(i, class, f64::NAN);
                }
            }
        }
        row += n;
    }
}
