// Options, and the C interface that testing.py calls.
#include <cstdlib>
#include <cstring>
#include <string>

#include "core.hpp"

namespace ptxsim {
static bool set_option(Config& c, const std::string& k, const std::string& v) {
  u64 n = strtoull(v.c_str(), nullptr, 0);
  if (k == "SEED")
    c.seed = n;
  else if (k == "SCHED")
    c.random = v == "random";
  else if (k == "ASYNC")
    c.async = v == "eager" ? EAGER : v == "random" ? RANDOM : LAZY;
  else if (k == "PREEMPT")
    c.preempt = n;
  else if (k == "UNINIT")
    c.uninit = n;
  else if (k == "RACE")
    c.race = n;
  else if (k == "PROXY")
    c.proxy = n;
  else if (k == "GLOBAL")
    c.global_check = n;
  else if (k == "CTA_ORDER")
    c.random_cta = v == "random";
  else if (k == "THREADS")
    c.threads = n;
  else if (k == "ARCH")
    c.arch = n;
  else if (k == "SMS")
    c.sms = n;
  else if (k == "DEVICES" && n >= 1 && n <= kMaxDevices)
    c.devices = n;
  else if (k == "VERBOSE")
    c.verbose = n;
  else
    return false;
  return true;
}
Config& config() {
  static Config c = [] {
    Config c;
    for (const char* k : {"SEED", "SCHED", "ASYNC", "PREEMPT", "UNINIT", "RACE", "PROXY", "GLOBAL", "CTA_ORDER",
                          "THREADS", "ARCH", "SMS", "DEVICES", "VERBOSE"})
      if (const char* v = getenv((std::string("PTXSIM_") + k).c_str())) set_option(c, k, v);
    return c;
  }();
  return c;
}
}  // namespace ptxsim

// ---- C interface for Python
extern "C" {
int ptxsim_set(const char* k, const char* v) { return ptxsim::set_option(ptxsim::config(), k, v) ? 0 : 1; }
void ptxsim_register(void* p, uint64_t n) { ptxsim::add_range(p, n); }
void ptxsim_unregister(void* p) { ptxsim::drop_range(p); }
const char* ptxsim_error() { return ptxsim::g_last_error.c_str(); }
// Launch by mangled name: dims = grid xyz, block xyz, cluster xyz.
int ptxsim_launch(const char* name, const uint32_t* dims, uint32_t smem, void** args) {
  const ptxsim::KernelInfo* k = ptxsim::find_kernel(name);
  if (!k) {
    ptxsim::g_last_error = std::string("no kernel ") + name;
    return 98;
  }
  ptxsim::Launch l;
  memcpy(l.grid, dims, 36);
  l.dyn_smem = smem;
  return ptxsim::launch(*k, l, args);
}
}
