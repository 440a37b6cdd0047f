/* Lets user-mode Linux before 6.13 run on hosts with AMX; preloaded into it.
 *
 * It saves and restores the floating-point registers of its processes with ptrace(2) in a buffer that is too small for
 * the state of such a host. Reads are truncated, but PTRACE_SETREGSET needs the whole state (otherwise EFAULT), and the
 * guest panics with "ptrace set fp regs failed". Here the missing end is filled with the current state of the process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

typedef long ptrace_function(enum __ptrace_request, long, void *, void *);

long ptrace(enum __ptrace_request request, ...)
{
	static char whole[16384] __attribute__((aligned(64)));
	static ptrace_function *real;
	va_list arguments;

	va_start(arguments, request);
	long pid = va_arg(arguments, long);
	void *address = va_arg(arguments, void *), *data = va_arg(arguments, void *);
	va_end(arguments);
	if (!real)
		real = (ptrace_function *)dlsym(RTLD_NEXT, "ptrace");
	long result = real(request, pid, address, data);
	if (result == 0 || errno != EFAULT || request != PTRACE_SETREGSET || (long)address != NT_X86_XSTATE)
		return result;

	struct iovec given = *(struct iovec *)data, all = {whole, sizeof whole};
	if (real(PTRACE_GETREGSET, pid, address, &all) != 0 || given.iov_len > all.iov_len)
		return -1;
	memcpy(whole, given.iov_base, given.iov_len);
	return real(PTRACE_SETREGSET, pid, address, &all);
}
