// Package history judges what clients of a volume saw: it takes the record of
// their reads, writes and flushes, and says whether guarantees C1 to C5 of
// docs/guarantees.md hold for it. It is a pure function of the record and knows
// nothing of how a volume works.
//
// Each written block carries who wrote it and a number of its own (Fill), so a
// read names the write that it saw. Blocks are judged one by one, by porcupine,
// as registers with this model of failure:
//
//   - A request that was never answered, or was answered with an error, took
//     effect before the next attachment was ready, or never.
//   - A continuous attachment loses nothing: it goes on with the same register.
//   - A lossy one may go back, to the last flushed value or to any that was
//     written since. Which one, it decides once: the first read fixes it.
//
// What this leaves out: that the values of different blocks after a lossy
// attachment are a prefix of one order. Replicas are compared by Compare.
//
// Start reading at History.Check.
package history
