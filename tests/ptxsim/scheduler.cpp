// Fibers and their scheduling, reports of faults and deadlocks, and the rendezvous of warps.
//
// Every CUDA thread is a fiber on a stack of its own; the thread blocks of one cluster are a Gang, which one OS thread
// runs. A fiber runs until it blocks, polls or (PREEMPT) touches memory; pick() chooses the next one.
#include <sys/mman.h>
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <sstream>
#include <thread>

#include "core.hpp"

namespace ptxsim {
// Saves the callee-saved registers on the current stack and continues on another one.
asm(R"(
.globl ptxsim_switch
.type ptxsim_switch, @function
ptxsim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size ptxsim_switch, .-ptxsim_switch
)");
[[noreturn]] void to_main(Gang& g) {
  void* dead;
  ptxsim_switch(&dead, g.main_stack);
  __builtin_unreachable();
}

// ---- reports

// A line of PTX, and the source lines it comes from (.loc): "x.ptx:12: bar.sync 0;  (k.cu:34, inlined at k.cu:56)".
static std::string ptx_line(const KernelInfo& k, u32 line) {
  std::ifstream in(k.ptx_file);
  std::string s, text, location;
  std::map<int, std::string> files;
  for (u32 n = 1; std::getline(in, s); n++) {
    int file;
    char name[1024];
    if (sscanf(s.c_str(), " .file %d \"%1023[^\"]\"", &file, name) == 2) files[file] = name;
    if (n <= line && s.find(".loc") != s.npos) location = s;
    if (n == line) text = s.substr(std::min(s.size(), s.find_first_not_of(" \t")));
  }
  if (text.size() > 140) text = text.substr(0, 140) + "...";
  std::string places;
  for (const char* key : {".loc %d %d", "inlined_at %d %d"}) {
    int file, source_line;
    size_t at = location.find(std::string(key, 4));
    if (at == location.npos || sscanf(location.c_str() + at, key, &file, &source_line) != 2) continue;
    places += (places.empty() ? "" : ", inlined at ") + files[file] + ":" + std::to_string(source_line);
  }
  return std::string(k.ptx_file) + ":" + std::to_string(line) + ": " + text +
         (places.empty() ? "" : "   (" + places + ")");
}
std::string g_last_error;
static std::mutex g_err_mutex;
void report(Gang& g, const std::string& msg) {
  g.failed = true;
  g.error = msg;
  std::lock_guard<std::mutex> l(g_err_mutex);
  if (g_last_error.empty()) g_last_error = msg;
  if (config().verbose) fprintf(stderr, "ptxsim: %s\n", msg.c_str());
}
void report_launch(const std::string& msg) {
  std::lock_guard<std::mutex> l(g_err_mutex);
  if (g_last_error.empty()) g_last_error = msg;
  if (config().verbose) fprintf(stderr, "ptxsim: %s\n", msg.c_str());
}
void fault(Thread& t, const char* fmt, ...) {
  char buf[1024];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  Fiber& f = fiber(t);
  std::ostringstream o;
  o << "kernel " << f.gang->k->name << " ctaid (" << t.ctaid[0] << "," << t.ctaid[1] << "," << t.ctaid[2] << ") tid ("
    << t.tid[0] << "," << t.tid[1] << "," << t.tid[2] << "): " << buf << "\n  at " << ptx_line(*f.gang->k, t.line);
  report(*f.gang, o.str());
  to_main(*f.gang);
}
static std::string describe_deadlock(Gang& g, const char* kind) {
  std::ostringstream o;
  o << kind << " in kernel " << g.k->name << ": no thread can continue";
  for (Cta* c : g.ctas) {
    o << "\n  ctaid (" << c->ctaid[0] << "," << c->ctaid[1] << "," << c->ctaid[2] << ")";
    for (size_t w = 0; w < c->warps.size(); w++) {  // group the lanes of a warp by position
      std::map<std::pair<u32, std::string>, u32> at;
      for (int l = 0; l < 32; l++) {
        Fiber* f = c->warps[w].lanes[l];
        if (!f) continue;
        char why[96];
        if (f->done)
          at[{0, "exited"}] |= 1u << l;
        else {
          snprintf(why, sizeof why, f->why ? f->why : "runnable", f->why_arg);
          at[{f->line, why}] |= 1u << l;
        }
      }
      for (auto& [k, m] : at) {
        char b[64];
        snprintf(b, sizeof b, "\n    warp %zu lanes %08x: ", w, m);
        o << b << k.second;
        if (k.first) o << " at " << ptx_line(*g.k, k.first);
      }
    }
    for (int i = 0; i < 16; i++)
      if (c->barriers[i].arrived)
        o << "\n    barrier " << i << ": " << c->barriers[i].arrived << " of "
          << (c->barriers[i].whole_block ? c->nthreads - c->exited : c->barriers[i].expected) << " threads arrived";
    for (auto& [a, m] : c->mbarriers) {
      char b[128];
      snprintf(b, sizeof b, "\n    mbarrier 0x%x: phase %lu, %u of %u arrivals pending, tx-count %ld", a, m.phase,
               m.pending, m.expected, m.tx);
      o << b;
    }
  }
  return o.str();
}

[[noreturn]] void fail_deadlock(Gang& g) {
  report(g, describe_deadlock(g, g.polling.empty() ? "deadlock" : "livelock"));
  to_main(g);
}

// ---- scheduling

bool Gang::run_async_one() {
  if (!async.empty()) {
    size_t i = config().random ? next_random() % async.size() : 0;
    AsyncOp op = std::move(async[i]);
    async.erase(async.begin() + i);
    u32 line = op.by->line;
    op.by->line = op.line;
    op.run();
    op.by->line = line;
    return true;
  }
  return false;
}
Fiber* Gang::pick() {
  if (config().async == RANDOM && !async.empty() && (next_random() >> 40) % 8 == 0) run_async_one();
  for (;;) {
    if (head < run_queue.size()) {
      if (config().random) {
        // Uniform choice keeps warps in step and hides reuse races; so warps get random
        // priorities (changed now and then) and the best of a few random candidates runs.
        size_t best = head;
        for (u32 i = 0; i < tournament; i++) {
          size_t j = head + (next_random() >> 20) % (run_queue.size() - head);
          if (!i || run_queue[j]->own_warp->priority > run_queue[best]->own_warp->priority) best = j;
        }
        std::swap(run_queue[head], run_queue[best]);
        if ((next_random() >> 22) % 2048 == 0) run_queue[head]->own_warp->priority = next_random() >> 32;
      }
      Fiber* f = run_queue[head++];
      if (head == run_queue.size()) {
        run_queue.clear();
        head = 0;
      } else if (head > 4096) {
        run_queue.erase(run_queue.begin(), run_queue.begin() + head);
        head = 0;
      }
      return f;
    }
    if (run_async_one()) continue;
    if (!copy_arrivals.empty()) {
      size_t i = config().random ? next_random() % copy_arrivals.size() : 0;
      Fiber* f = copy_arrivals[i];
      copy_arrivals.erase(copy_arrivals.begin() + i);
      run_copies_until_arrival(*f);
      continue;
    }
    if (!polling.empty()) {
      if (++spin_rounds > 1000) std::this_thread::yield();
      if (spin_rounds > 300000) return nullptr;
      for (Fiber* f : polling) ready(f);
      polling.clear();
      continue;
    }
    return nullptr;
  }
}
void Gang::block(Fiber& f, const char* why, u32 arg) {
  f.why = why;
  f.why_arg = arg;
  Fiber* n = pick();
  if (!n) fail_deadlock(*this);
  n->why = nullptr;
  if (n == &f) return;
  cur = n;
  ptxsim_switch(&f.sp, n->sp);
}
void maybe_preempt(Thread& t) {
  Fiber& f = fiber(t);
  if ((f.gang->next_random() >> 24) % config().preempt) return;
  f.gang->ready(&f);
  f.gang->block(f, "preempted");
}
void yield_polling(Fiber& f) {
  f.gang->polling.push_back(&f);
  f.gang->block(f, "polling");
}
void spin_hint(Thread& t) {
  if (++fiber(t).spins % 256 == 0) yield_polling(fiber(t));
}
void polling_yield(Thread& t) { yield_polling(fiber(t)); }
u64 clock64(Thread& t) { return fiber(t).gang->ticks += 16; }

void finish_rendezvous(Warp& w, size_t i, Fiber* self) {
  Rendezvous c = w.rendezvous[i];
  w.rendezvous.erase(w.rendezvous.begin() + i);
  c.fn(w, c.arrived, c.args, c.spec);
  for (int l = 0; l < 32; l++)
    if ((c.arrived >> l & 1) && w.lanes[l] != self) w.lanes[l]->gang->ready(w.lanes[l]);
}
void collective(Thread& t, u32 key, u32 mask, void* arg, RendezvousFunction fn, const void* spec, const char* what) {
  Fiber& f = fiber(t);
  Warp& w = *f.own_warp;
  if (!(mask >> t.lane & 1)) fault(t, "%s: executing lane %u is not in the member mask 0x%08x", what, t.lane, mask);
  size_t i = 0;
  while (i < w.rendezvous.size() &&
         !(w.rendezvous[i].key == key && w.rendezvous[i].mask == mask && !(w.rendezvous[i].arrived >> t.lane & 1)))
    i++;
  if (i == w.rendezvous.size()) w.rendezvous.push_back({key, mask, 0, fn, spec, {}});
  Rendezvous& c = w.rendezvous[i];
  c.args[t.lane] = arg;
  c.arrived |= 1u << t.lane;
  if (c.arrived == (mask & w.live))
    finish_rendezvous(w, i, &f);
  else
    f.gang->block(f, what);
}
}  // namespace ptxsim
