//! What the memory allows: plain loops over the same bytes as the operations, by the same instructions and threads. For benchmarks.

use core::hint::black_box;

use crate::array::{Array, DType, Out, Span, SpanMut};
use crate::simd::{Isa, Kernel, Vector};
use crate::threads;

use super::api::{Error, Exec};

/// Elements per task.
const TASK: usize = 1 << 17;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// The source is read.
    Read,
    /// The source is copied by ordinary stores.
    Copy,
    /// The source is copied past the caches.
    Stream,
    /// The destination is read and rewritten in place.
    Rewrite,
}

struct Pass<'a> {
    traffic: Traffic,
    src: Span<'a, f32>,
    dst: SpanMut<'a, f32>,
}

impl Kernel for Pass<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let Pass { traffic, src, dst } = self;
        let step = S::F32::LANES;
        let one = S::F32::splat(isa, black_box(1.0));
        let mut max = [one; 4];
        let len = src.len();
        // Elements on either side of the aligned vectors are too few to matter.
        let mut i = if traffic == Traffic::Stream { dst.lead().min(len) } else { 0 };
        match traffic {
            Traffic::Read => {
                while i + 4 * step <= len {
                    for (u, max) in max.iter_mut().enumerate() {
                        *max = src.load(isa, i + u * step).max(*max);
                    }
                    i += 4 * step;
                }
                black_box((max[0].max(max[1])).max(max[2].max(max[3])).reduce_max());
            }
            Traffic::Copy => {
                while i + step <= len {
                    dst.store(isa, i, src.load(isa, i));
                    i += step;
                }
            }
            Traffic::Stream => {
                while i + step <= len {
                    dst.stream(isa, i, src.load(isa, i));
                    i += step;
                }
                isa.fence();
            }
            Traffic::Rewrite => {
                while i + step <= len {
                    dst.store(isa, i, dst.read().load(isa, i) * one);
                    i += step;
                }
            }
        }
    }
}

/// One pass over flat float32 arrays of one length.
pub fn bandwidth(exec: &Exec, traffic: Traffic, src: &Array, dst: &Out) -> Result<(), Error> {
    let (n, strides) = (src.size(), [size_of::<f32>() as isize]);
    let flat = |array: &Array| array.dtype() == DType::F32 && array.shape() == [n] && (n <= 1 || array.strides() == strides);
    if !flat(src) || !flat(dst.array()) || !src.is_plain() {
        return Err(Error::Invalid("bandwidth takes flat float32 arrays of one length"));
    }
    threads::for_each(exec.threads, n.div_ceil(TASK), &|task| {
        let start = task * TASK;
        let len = TASK.min(n - start);
        exec.level.run(Pass { traffic, src: src.span(0, n).part(start, len), dst: dst.span(0, n).part(start, len) });
    });
    Ok(())
}
